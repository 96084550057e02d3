"""Pictures of a run while it trains: the same images and random numbers every time, so that only the weights differ.

RUN/previews/step-00000100.png    an image a column: itself, through the tokenizer, drawn, generated
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varpi import objective
from varpi.data import BadImage, Dropped
from varpi.data.caption_check import checked
from varpi.data.opening import AnyBatches, open_held_out
from varpi.data.pixels import to_uint8
from varpi.errors import VarpiError
from varpi.methods import Method, generator_of
from varpi.recipe import Recipe
from varpi.runtime.processes import World, autocast
from varpi.runtime.randomness import Stream, uniforms
from varpi.samples.images import make_grid, save_png
from varpi.sampling.generate import generate_with
from varpi.sampling.settings import Sampling
from varpi.training.logging import Logger, Metrics, Silence
from varpi.training.validation import as_batch, caption_check

PREVIEWS = "previews"
_AT_ONCE = 8
"""Images decoded at once."""


class Previewer:
    """What a recipe's `preview` asks for; opens its images, their classes numbered as in the `batches`."""

    def __init__(self, recipe: Recipe, world: World, batches: AnyBatches) -> None:
        assert recipe.preview is not None
        self.every = recipe.preview.every
        self._settings = recipe.preview
        self._recipe, self._world = recipe, world
        try:
            some = 4 * recipe.preview.images  # for not each can be used
            self._dataset = open_held_out(recipe, recipe.preview.split, batches, some)
        except VarpiError as error:
            raise VarpiError(f"preview.split is {recipe.preview.split!r}: {error}") from error
        self._items: dict[int, Any] = {}

    @torch.no_grad()
    def show(self, method: Method, run: Path, step: int, logger: Logger | Silence) -> Metrics:
        """Write the picture of a step and hand it to the logger; the loss of its images, and their reward.

        Every process makes all of it, because sharded models need each of them in every pass.
        """
        batch = as_batch(method, self._chosen(method), self._world.device)
        numbers = {"preview_loss": float(method.validation_loss(batch))}
        if self._recipe.method.rewards_held_out:
            numbers["preview_reward"] = float(method.validation_reward(batch))
        rows = self._rows(method, batch.images, batch.condition)
        method.stages.take()
        if self._world.is_main:
            picture = make_grid(np.concatenate(rows), len(rows[0]))
            save_png(run / PREVIEWS / f"step-{step:08d}.png", picture)
            logger.picture(step, "preview", picture)
        return numbers

    def _rows(self, method: Any, images: Tensor, condition: Any) -> list[np.ndarray]:
        generator, tokenizer = generator_of(method), method.tokenizer
        tokens = tokenizer.eval().encode(images)
        shown = [images, _decode(tokenizer, tokens)]
        if generator is not None:
            places, seed, size = range(len(images)), self._recipe.seed, tokens.shape[1]
            with autocast(self._world.device, self._recipe.training.precision):
                logits = generator.eval().logits(tokens, condition)
                draws = uniforms(seed, 0, places, (1, size), stream=Stream.PREVIEW, device=self._world.device)
                forced = objective.sample_tokens(logits, 1, uniforms=draws)[:, 0]
                # The numbers of `varpi sample` with this seed, but given, so that FSDP's buffers stay fit for training
                draws = uniforms(seed, 0, places, (size,), stream=Stream.GENERATION)
                free = generate_with(
                    generator, condition, Sampling(guidance_scale=self._settings.guidance_scale), draws=draws
                )
            shown += [_decode(tokenizer, forced), _decode(tokenizer, free)]
        return [to_uint8(row) for row in shown]

    def _chosen(self, method: Method) -> dict[int, Any]:
        """The images, spread evenly; in place of one that cannot be used the next that can."""
        if not self._items:
            dataset = checked(self._dataset, caption_check(method))
            count = min(self._settings.images, len(dataset))
            for place in range(count):
                for index in range(place * len(dataset) // count, (place + 1) * len(dataset) // count):
                    with suppress(BadImage, Dropped):
                        self._items[index] = dataset[index]
                        break
            if not self._items:
                raise VarpiError(f"preview: none of the images of split {self._settings.split!r} could be read")
        return self._items


def _decode(tokenizer: Any, tokens: Tensor) -> Tensor:
    return torch.cat([tokenizer.decode(part) for part in tokens.split(_AT_ONCE)])
