"""What a tokenizer is: a frozen pair of maps between images and a grid of discrete tokens."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from .vq import VQ, VQConfig

__all__ = ["VQ", "Tokenizer", "VQConfig"]


@runtime_checkable
class Tokenizer(Protocol):
    """The protocol that methods and sampling are written against. Implementations are `nn.Module`s."""

    codebook_size: int
    downsample: int

    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1] to int64 tokens (B,N), row-major."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B,N) of a square grid to float32 images (B,3,H,W), nominally in [-1,1], not clamped."""
        ...
