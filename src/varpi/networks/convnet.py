"""A small convolutional classifier for images of 32 pixels: its maps can reward, its embedding can evaluate.

One class, two jobs that must never share weights: the reward's perceptual distance (perceptual.ConvPerceptual) and the
judges (judges.load_judge).
B images, C channels of a map, D embedding width.
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.runtime.files import write_aside
from varpi.runtime.tensors import read_checkpoint, write_safetensors

_NORM_GROUPS = 8
_LAYERS = 3
"""Of a stage that belong to one convolution."""


class SmallConvNet(nn.Module):
    """Stages of two 3x3 convolutions, halving the resolution between stages; a linear head on the pooled last map.

    With group normalization an image's maps depend on that image alone, in training and in evaluation. Batch
    normalization learns photographs several times as fast.

    Args:
        channels: width of each stage, every one a multiple of 8; the last is the embedding width D.
        num_classes: outputs of the head.
        residual: each stage adds what its second convolution gives to what its first one gave (arXiv 1512.03385).
        norm: "group" or "batch".
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32, 64),
        num_classes: int = 10,
        *,
        residual: bool = False,
        norm: str = "group",
    ) -> None:
        super().__init__()
        if not channels or any(width < 1 or width % _NORM_GROUPS for width in channels):
            raise VarpiError(f"SmallConvNet: channels are {tuple(channels)}; each must be a multiple of {_NORM_GROUPS}")
        self.channels = tuple(channels)
        self.num_classes = num_classes
        self.residual = residual
        self.norm = norm
        widths = (3, *self.channels)
        self.stages: Any = nn.ModuleList(_stage(a, b, norm) for a, b in pairwise(widths))
        self.downsample = nn.MaxPool2d(2)
        self.head = nn.Linear(self.channels[-1], num_classes)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Maps after each stage: images (B,3,H,W) in [-1,1] -> [(B,C_i,H/2^i,W/2^i)], nonnegative."""
        maps: list[Tensor] = []
        hidden = images
        for stage in self.stages:
            hidden = self.downsample(hidden) if maps else hidden
            if self.residual:
                first = stage[:_LAYERS](hidden)
                hidden = first + stage[_LAYERS:](first)
            else:
                hidden = stage(hidden)
            maps.append(hidden)
        return maps

    def embedding(self, images: Tensor) -> Tensor:
        """Spatial mean of the last map: (B,3,H,W) -> (B,D). `head` turns it into class logits."""
        return self.maps(images)[-1].mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """Class logits: (B,3,H,W) -> (B,num_classes)."""
        return self.head(self.embedding(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)


def _stage(channels_in: int, channels_out: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (channels_in, channels_out):
        layers += [
            nn.Conv2d(width, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out) if norm == "batch" else nn.GroupNorm(_NORM_GROUPS, channels_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def save_classifier(
    network: SmallConvNet, path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], extra: Mapping[str, str]
) -> None:
    """Write a classifier's full weights as safetensors with its configuration inside."""
    config: dict[str, Any] = {"channels": list(network.channels), "num_classes": network.num_classes}
    if network.residual:  # not written otherwise, so that files of plain networks stay as they were
        config["residual"] = True
    if network.norm != "group":
        config["norm"] = network.norm
    description = {"format": 1, "kind": "classifier", "architecture": "small-conv-net", "config": config}
    metadata = {"format": "pt", **extra, "varpi": json.dumps(description)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    write_aside(path, lambda aside: write_safetensors(tensors, aside, metadata))


def load_classifier(path: str | os.PathLike[str], device: str = "cpu") -> SmallConvNet:
    """A classifier that `save_classifier` wrote, frozen, in eval mode."""
    checkpoint = read_checkpoint(path)
    description = json.loads(checkpoint.metadata.get("varpi", "{}"))
    if description.get("kind") != "classifier":
        raise VarpiError(f"{os.fspath(path)}: holds no classifier that varpi wrote")
    network = SmallConvNet(**description["config"])
    network.load_state_dict(checkpoint.tensors)
    return network.requires_grad_(False).eval().to(device)
