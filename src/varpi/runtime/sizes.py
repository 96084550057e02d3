"""Models without their numbers, where only their sizes matter; see `varpi.runtime.ledger`."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

_sizes_only: ContextVar[bool] = ContextVar("sizes_only", default=False)
_for_a_card: ContextVar[bool] = ContextVar("for_a_card", default=False)


def sizes_only() -> bool:
    """Whether weights are to be made without their numbers."""
    return _sizes_only.get()


@contextmanager
def without_weights() -> Iterator[None]:
    """Within, models are made without reading their weights; `sizes_only` says so."""
    token = _sizes_only.set(True)
    try:
        yield
    finally:
        _sizes_only.reset(token)


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """Within, tensors on the CPU stand for those of a card; `on_cpu` says so."""
    token = _for_a_card.set(True)
    try:
        yield
    finally:
        _for_a_card.reset(token)


def on_cpu(tensor: torch.Tensor) -> bool:
    """Whether what only a CPU is better at is to be done with a tensor."""
    return tensor.device.type == "cpu" and not _for_a_card.get()


def without_numbers(model: Model, device: torch.device | str, dtype: torch.dtype | str) -> Model:
    """A model that was made on the meta device, with weights of a type and in a place; see `sizes_only`."""
    named = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    kinds = {name: named if old.is_floating_point() else old.dtype for name, old in model.state_dict().items()}
    shapes = {name: old.shape for name, old in model.state_dict().items()}
    weights = {name: torch.empty(shapes[name], dtype=kind, device=device) for name, kind in kinds.items()}
    model.load_state_dict(weights, assign=True)
    return model
