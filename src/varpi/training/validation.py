"""Validation: the loss on held-out images, and their reward, by all processes together."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from varpi.data import BadImage, Batch, Dataset, Dropped, Item
from varpi.data.caption_check import CaptionCheck, checked
from varpi.data.left_out import LeftOut
from varpi.data.loader import collate_conditions
from varpi.data.opening import AnyBatches, open_held_out
from varpi.errors import VarpiError
from varpi.methods import Method, generator_of
from varpi.recipe import Recipe
from varpi.runtime.processes import World
from varpi.training.state import Progress


class Validator:
    """What a recipe's `validation` asks for; opens the held-out images, their classes numbered as in the `batches`."""

    def __init__(self, recipe: Recipe, world: World, batches: AnyBatches) -> None:
        assert recipe.validation is not None
        self.every = recipe.validation.every
        self._best_by = recipe.validation.best_by
        self._rewards = recipe.method.rewards_held_out
        self._world = world
        try:
            self._dataset = open_held_out(recipe, recipe.validation.split, batches, recipe.validation.images)
        except VarpiError as error:
            raise VarpiError(f"validation: {error}; or train without it: --set validation=null") from error
        whole = len(self._dataset)
        self._count = min(recipe.validation.images or whole, whole)
        self._indices = [i * whole // self._count for i in range(self._count)]
        self._size = recipe.training.micro_batch or recipe.training.batch_size // world.size  # as in training
        self._source = f"{recipe.data.source}[{recipe.validation.split}]"
        self._said: dict[str, tuple[int, str]] = {}

    @torch.no_grad()
    def measure(self, method: Method) -> dict[str, float]:
        """ "loss", and "reward" where the method has one: means over the held-out images.

        Those that cannot be used are left out, which is said when it changes.
        """
        loss, reward, images, left_out = 0.0, 0.0, 0.0, LeftOut()
        dataset = checked(self._dataset, caption_check(method))
        rounds = -(-self._count // (self._size * self._world.size))  # the same number on every process:
        filler = _first_readable(dataset)  # sharded models need every process in every pass
        for i in range(rounds):
            first = (i * self._world.size + self._world.rank) * self._size
            items = _readable(dataset, self._indices[first : first + self._size], left_out)
            batch = as_batch(method, items or filler, self._world.device)
            of_batch = float(method.validation_loss(batch))
            reward_of_batch = float(method.validation_reward(batch)) if self._rewards else 0.0
            if items:
                loss, reward = loss + of_batch * len(items), reward + reward_of_batch * len(items)
                images += len(items)
        method.stages.take()
        loss, reward, images = self._world.sum([loss, reward, images])
        left_out = LeftOut(*self._world.gather(left_out.found))
        if self._world.is_main and left_out.found != self._said:
            self._said = left_out.found
            left_out.say(self._source, self._count, "held-out images")
        if not images:
            raise VarpiError(f"validation: none of {self._count} held-out images could be read")
        return {"loss": loss / images} | ({"reward": reward / images} if self._rewards else {})

    def note(self, progress: Progress, found: dict[str, float]) -> bool:
        """Count a validation; whether it is the best so far, of a run that looks for the best."""
        if self._best_by is None:
            return False
        return note_loss(progress, found["loss"] if self._best_by == "loss" else -found["reward"])


def as_batch(method: Method, items: dict[int, Item], device: str) -> Batch:
    """Items by their index, as a method takes them."""
    conditions = collate_conditions([item.condition for item in items.values()])
    indices = torch.tensor([*items])
    return Batch(
        images=torch.stack([item.image for item in items.values()]).to(device),
        condition=prepare_condition(method, conditions, device),
        positions=indices,  # so that no draw depends on what shares the batch
        indices=indices,
        bad=0,
    )


def note_loss(progress: Progress, loss: float) -> bool:
    """Count a validation by its loss, or minus its reward; whether that is the best so far."""
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step, progress.validations_since_best = loss, progress.step, 0
        return True
    progress.validations_since_best += 1
    return False


def prepare_condition(method: Method, condition: Any, device: str) -> Any:
    """What data gives, in the form that the method's generator takes; captions that none takes stay as they are."""
    generator = generator_of(method)
    if generator is not None:
        condition = generator.prepare_condition(condition)
    return condition if isinstance(condition, list) else condition.to(device)


def caption_check(method: Method) -> CaptionCheck | None:
    """What leaves out the captions that the method's generator cannot take."""
    generator = generator_of(method)
    return None if generator is None else generator.caption_check


def _readable(dataset: Dataset, indices: Sequence[int], left_out: LeftOut) -> dict[int, Item]:
    """The items that can be used, by index; the others are counted."""
    items = {}
    for index in indices:
        try:
            items[index] = dataset[index]
        except (BadImage, Dropped) as error:
            left_out.note(error)
    return items


def _first_readable(dataset: Dataset) -> dict[int, Item]:
    for index in range(len(dataset)):
        with suppress(BadImage, Dropped):
            return {index: dataset[index]}
    raise VarpiError(f"validation: none of the {len(dataset)} held-out images could be read")
