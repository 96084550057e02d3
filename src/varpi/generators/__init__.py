"""What a generator is: an autoregressive transformer over an image's grid of discrete tokens.

Shapes: B images, N tokens per image (row-major grid), V vocabulary, L condition tokens.

A *condition* is opaque outside the generator that understands it: it has a length, can be indexed with a slice or an
index tensor, moved with `.to(device)` and concatenated with `concat_conditions`. Class ids are a plain int64 tensor.
`prepare_condition` makes one from what data gives: class ids, captions, or caption features.
"""

from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from .llamagen import LlamaGen, LlamaGenConfig, TextCondition

__all__ = ["Generator", "LlamaGen", "LlamaGenConfig", "TextCondition", "concat_conditions"]


@runtime_checkable
class Generator(Protocol):
    """The protocol that methods, sampling and checkpoints are written against. Implementations are `nn.Module`s."""

    vocab_size: int
    grid: int
    num_tokens: int
    num_classes: int | None
    """Classes it knows; None: it is conditioned on text."""
    class_names: tuple[str, ...] | None
    """What its classes are called, in the order of their ids, where its file says so."""
    gradient_checkpointing: bool
    training: bool

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's layers: what is sharded, checkpointed and adapted by itself."""
        ...

    def reset_tables(self) -> None:
        """Make again what no checkpoint holds; needed after construction on the meta device."""
        ...

    def logits(self, tokens: Tensor, condition: Any) -> Tensor:
        """Teacher-forced float32 logits (B,N,V): position i predicts tokens[:, i] and sees only tokens[:, :i]."""
        ...

    def prepare_condition(self, condition: Any) -> Any:
        """The generator's own condition, on its device, from one of these or from a batch of what data gives.

        Data gives class ids (int64 (B,) or a list), captions (a list of B strings), or caption features (a list of B
        floating-point tensors (L,C) of valid tokens only). Raises VarpiError for what the generator cannot use.
        """
        ...

    def drop_condition(self, condition: Any, drop: Tensor) -> Any:
        """The condition with the null condition wherever `drop` (B,) is true."""
        ...

    def new_cache(self, batch_size: int) -> Any:
        """A static key-value cache for `batch_size` sequences."""
        ...

    def prefill(self, condition: Any, cache: Any) -> Tensor:
        """Float32 logits (B,V) of image token 0; fills the cache with the condition."""
        ...

    def decode_step(self, tokens: Tensor, position: int, cache: Any) -> Tensor:
        """Consume image token number `position` (B,); float32 logits (B,V) of the next one."""
        ...

    # What every nn.Module has, spelled out so that code typed against the protocol can use it.
    def parameters(self, recurse: bool = True) -> Any: ...
    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...


def concat_conditions(first: Any, second: Any) -> Any:
    """`first` followed by `second`, along the batch."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    return first.concat(second)
