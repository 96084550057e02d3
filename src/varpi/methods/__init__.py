"""What a method is: a batch of images in, a loss out. One file each, readable beside its paper.

A method is a module of this package, named as recipes name it, and found by that name. It has

    Settings      a `varpi.recipe.MethodSection`: its keys in a recipe, each with a sentence, and what it needs
    from_recipe   (recipe, num_classes, device) -> Method, which loads what the recipe names

Modules without `Settings` are what methods share.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from varpi.data import Batch
from varpi.generators import Generator
from varpi.recipe import Recipe
from varpi.runtime.stages import Stages

__all__ = ["Method", "Outcome", "build_method", "generator_of"]


@dataclass
class Outcome:
    """What a method makes of a micro-batch."""

    loss: Tensor
    """Scalar, the mean over the micro-batch's images."""
    metrics: dict[str, Tensor]
    """Scalars to log, means over the micro-batch's images."""
    rollout: Any = None
    """Handed back with the same micro-batch when more than one update is made from it."""


class Method(Protocol):
    """What the training loop asks of a method."""

    model: nn.Module
    """The module whose parameters are trained."""
    frozen: tuple[nn.Module, ...]
    """Frozen models as large as the trained one, to be sharded with it."""
    stages: Stages

    def loss(self, batch: Batch, step: int, rollout: Any = None) -> Outcome:
        """The differentiable loss of a micro-batch. `step` keys its random draws together with batch.positions."""
        ...

    def validation_loss(self, batch: Batch) -> Tensor:
        """The scalar that held-out data is judged by, a mean over the batch's images."""
        ...

    def validation_reward(self, batch: Batch) -> Tensor:
        """The reward of held-out data, likewise; asked for only where the settings say `rewards_held_out`."""
        ...

    def save(self, path: Any, state_dict: dict[str, Tensor], extra: dict[str, str]) -> None:
        """Write the trained model, whose full weights are `state_dict`, for `load_generator` and its like."""
        ...


def build_method(recipe: Recipe, num_classes: int | None, device: str) -> Method:
    """Load what the recipe names and put the method together. Everything that can be refused is refused here.

    num_classes: of the data; None for captions.
    """
    module = importlib.import_module(f"varpi.methods.{recipe.method.name}")
    torch.manual_seed(recipe.seed)  # for what starts from fresh weights
    return module.from_recipe(recipe, num_classes, device)


def generator_of(method: Method) -> Generator | None:
    """The generator that takes the conditions: the one that is trained, or else a frozen one."""
    return next((model for model in (method.model, *method.frozen) if isinstance(model, Generator)), None)
