"""What a generator is: an autoregressive transformer over an image's grid of discrete tokens.

Shapes: B images, N tokens per image (row-major grid), V vocabulary, L condition tokens.

A *condition* is opaque outside the generator that understands it: it has a length, can be indexed with a slice or an
index tensor, moved with `.to(device)` and concatenated with `concat_conditions`. Class ids are a plain int64 tensor.
`prepare_condition` makes one from what data gives: class ids, captions, or caption features.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from varpi.data.caption_check import CaptionCheck
from varpi.runtime.pretrained import Stored


class CaptionEncoder(Protocol):
    """Turns captions into what a generator of caption features reads; `TextEncoder` is one."""

    @property
    def caption_check(self) -> CaptionCheck:
        """Refuses captions that are none to encode."""
        ...

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Of each, float (L,C): valid tokens only."""
        ...


class Generator(Stored, ABC):
    """What methods, sampling and checkpoints are written against."""

    vocab_size: int
    grid: int
    """Tokens per side."""
    num_tokens: int
    num_classes: int | None
    """Classes it knows; None: it is conditioned on text."""
    blocks: nn.ModuleList
    """The transformer's layers: what is sharded, checkpointed and adapted by itself."""
    class_names: tuple[str, ...] | None = None
    """Names of its classes by id, as far as they are known; saved with its weights."""
    caption_features: tuple[int, int] | None = None
    """(L,C) of the caption features that it reads: most tokens, width. None: it reads none."""
    text_encoder: CaptionEncoder | None = None
    """For one that reads caption features: what makes them."""
    gradient_checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def caption_check(self) -> CaptionCheck | None:
        """Refuses captions that it cannot be conditioned on; light, for the processes that load data. None: none."""
        return None if self.text_encoder is None else self.text_encoder.caption_check

    def forward(self, tokens: Tensor, condition: Any) -> Tensor:
        return self.logits(tokens, condition)

    @abstractmethod
    def logits(self, tokens: Tensor, condition: Any) -> Tensor:
        """Teacher-forced float32 logits (B,N,V): position i predicts tokens[:, i] and sees only tokens[:, :i]."""

    @abstractmethod
    def prepare_condition(self, condition: Any) -> Any:
        """The generator's own condition, on its device, from one of these or from a batch of what data gives.

        Data gives class ids (int64 (B,) or a list), captions (a list of B strings), or caption features (a list of B
        floating-point tensors (L,C) of valid tokens only). Raises VarpiError for what the generator cannot use.
        """

    @abstractmethod
    def drop_condition(self, condition: Any, drop: Tensor) -> Any:
        """The condition with the null condition wherever `drop` (B,) is true."""

    @abstractmethod
    def new_cache(self, batch_size: int, *, static: bool = False) -> Any:
        """Room for the keys and values of `batch_size` sequences, written in place; `first(n)` is that of n of them.

        static: decoding attends to the whole of it under a mask, so that shapes and addresses are the same at every
        position and the position is never asked for by the host, as CUDA graphs need. Otherwise it attends to what is
        written alone, which is half the work. Raises VarpiError where a family cannot.
        """

    @abstractmethod
    def prefill(self, condition: Any, cache: Any) -> Tensor:
        """Float32 logits (B,V) of image token 0; fills the cache with the condition."""

    @abstractmethod
    def decode_step(self, tokens: Tensor, position: Tensor, cache: Any) -> Tensor:
        """Consume image tokens (B,), all of them number `position`, int64 (); float32 logits (B,V) of the next ones.

        position: on the CPU, or where the cache lies if that is static.
        """


def concat_conditions(first: Any, second: Any) -> Any:
    """`first` followed by `second`, along the batch."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    return first.concat(second)
