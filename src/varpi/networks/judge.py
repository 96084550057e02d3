"""The judge of the embedded digits: a small classifier, trained apart from every reward, that measures samples.

Shapes: n images, D features.
"""

import torch

from varpi.data.pixels import from_uint8, to_uint8
from varpi.errors import VarpiError
from varpi.networks.classifier import load_classifier
from varpi.networks.convnet import SmallConvNet
from varpi.runtime.tensors import embedded


def load_judge(device: str = "cpu") -> SmallConvNet:
    """The judge that ships with the package; frozen, in eval mode."""
    return load_classifier(embedded("digits", "judge"), device)


@torch.no_grad()
def embed(judge: SmallConvNet, images: torch.Tensor, *, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
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
