"""What a tokenizer is: a frozen pair of maps between images and a grid of discrete tokens."""

from abc import ABC, abstractmethod

from torch import Tensor

from varpi.runtime.pretrained import Stored


class Tokenizer(Stored, ABC):
    """What methods and sampling are written against."""

    codebook_size: int
    downsample: int
    """Pixels per token, along a side."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1] to int64 tokens (B,N), row-major."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B,N) of a square grid to float32 images (B,3,H,W), nominally in [-1,1], not clamped."""
