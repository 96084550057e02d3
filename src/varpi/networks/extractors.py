"""What an evaluation asks of a network: the features of images, and everything that moves them, as one record.

Shapes: B images of H x W pixels, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from varpi.errors import VarpiError

Streams = dict[str, Tensor]


class FeatureExtractor(Protocol):
    """What an evaluation asks of a network."""

    @property
    def name(self) -> str:
        """Names the metrics: on "inception" the Fréchet distance is FID."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that moves its outputs: name, sha256 of the weights, precision, software, preprocessing."""
        ...

    @property
    def streams(self) -> Mapping[str, int]:
        """What it gives for an image: a name and a width each. "pool" is always there; see `load_extractor`."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What a reader of its numbers should know, a line each."""
        ...

    def __call__(self, images: Tensor) -> Streams:
        """The streams of uint8 images (B,3,H,W), float32 (B,D) each, on any device."""
        ...


@dataclass(frozen=True)
class Network:
    """A frozen network as a `FeatureExtractor`."""

    name: str
    identity: Mapping[str, str]
    streams: Mapping[str, int]
    device: str
    forward: Callable[[Tensor], Streams]
    """From uint8 images (B,3,H,W) on `device`."""
    warnings: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Streams:
        """Raises VarpiError for anything but uint8 images (B,3,H,W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise VarpiError(
                f"{self.name}: expected uint8 images of shape (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        # By default cuDNN rounds the factors of float32 convolutions to 10 bits and may sum in another order each time.
        exact = torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=False,
            deterministic=True,
            allow_tf32=False,
            fp32_precision="ieee",
        )
        with torch.inference_mode(), exact:
            return {name: stream.float() for name, stream in self.forward(images.to(self.device)).items()}


def autocast_of(device: str, precision: str) -> torch.autocast:
    """The precision of an extractor, "fp32" or "bf16", as a context."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
