"""The judges of the embedded pairs: classifiers that measure samples, and by which nothing was trained.

Shapes: n images, B at once, D features.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from varpi.data.pixels import from_uint8, to_uint8
from varpi.errors import VarpiError
from varpi.networks.convnet import SmallConvNet, load_classifier
from varpi.networks.extractors import Network, Streams, autocast_of
from varpi.runtime.sources import embedded
from varpi.runtime.tensors import sha256_of

JUDGES = ("digits", "cifar10")
"""Of which embedded pairs there are judges. Each tells ten classes apart, numbered as those of its data."""


def load_judge(name: str = "digits", device: str = "cpu") -> SmallConvNet:
    """The judge of an embedded pair, of `JUDGES`; frozen, in eval mode."""
    return load_classifier(embedded(name, "judge"), device)


@torch.no_grad()
def embed(judge: SmallConvNet, images: Tensor, *, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """What the judge sees in images (n,3,H,W) in [-1,1]: features float32 (n,D) and classes int64 (n,), on the CPU.

    Images are quantized to 8 bits first, as saved ones are, so that no model gains by colours that no file can hold.
    Raises VarpiError for no images, another shape or non-finite pixels.
    """
    if len(images) == 0:
        raise VarpiError("the judge got no images")
    device = next(judge.parameters()).device
    features, classes = [], []
    for batch in images.split(batch_size):
        embedding = judge.embedding(from_uint8(to_uint8(batch)).to(device))
        features.append(embedding.cpu())
        classes.append(judge.head(embedding).argmax(dim=1).cpu())
    return torch.cat(features), torch.cat(classes)


def load_judge_extractor(name: str, weights: str | os.PathLike[str] | None, device: str, precision: str) -> Network:
    """A judge as an extractor of the same name. weights: a classifier's file; none: the embedded one."""
    path = embedded(name, "judge") if weights is None else Path(weights)
    judge = load_classifier(path, device)
    autocast = autocast_of(device, precision)

    def forward(images: Tensor) -> Streams:
        if images.shape[2:] != (32, 32):
            raise VarpiError(
                f"images of {images.shape[3]}x{images.shape[2]} pixels; the judge {name} knows images of 32x32"
            )
        with autocast:
            pool = judge.embedding(images.float() / 127.5 - 1).float()
        return {"pool": pool, "logits": judge.head(pool)}

    return Network(
        name,
        {
            "name": name,
            "weights_sha256": sha256_of(path),
            "precision": precision,
            "software": "varpi's SmallConvNet",
            "preprocessing": "x / 127.5 - 1",
        },
        {"pool": judge.channels[-1], "logits": judge.num_classes},
        device,
        forward,
    )
