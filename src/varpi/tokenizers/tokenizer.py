"""What a tokenizer is: a frozen pair of maps between images and a grid of discrete tokens."""

from abc import ABC, abstractmethod

from torch import Tensor

from varpi.errors import VarpiError
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

    def code_vectors(self) -> Tensor:
        """Float32 (K,C): the vector that `decode` puts in a token's place. Raises VarpiError where there is none."""
        raise VarpiError(f"a {type(self).__name__} has no code vectors, whose gradient this method needs")

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Code vectors (B,C,h,w) to images as `decode` gives them, with gradient; see `code_vectors`."""
        raise VarpiError(f"a {type(self).__name__} decodes tokens, not code vectors")

    def lower_decoder(self) -> None:
        """Hold what only `decode` uses in bfloat16, as decodes fastest; nothing where a family has no such form.

        For the rewards of a run, where small errors are as good as none: the decoder is not to be saved or trained.
        """
