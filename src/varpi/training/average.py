"""An average of the trained weights over the updates (EMA), kept where the weights are: sharded like them, in float32.

average <- decay · average + (1 - decay) · weights    after every update; it begins as the weights do
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from varpi.training.sharding import local


class Average:
    """The average of a model's trainable weights, which may be sharded already."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.weights = {name: parameter.detach().clone() for name, parameter in self._trained.items()}
        """By name; a checkpoint holds them."""

    @torch.no_grad()
    def update(self) -> None:
        """Take in what the weights are now."""
        for name, parameter in self._trained.items():
            local(self.weights[name]).lerp_(local(parameter), 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the average for weights; afterwards its own again, to the bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what a pass without a backward pass gathered is of other weights now
        for name, parameter in self._trained.items():
            one, other = local(parameter), local(self.weights[name])
            held = one.clone()
            one.copy_(other)
            other.copy_(held)
