"""Distilled guidance: the generator learns, without guidance, to be its guided start.

    loss = cross-entropy of softmax(l) under softmax((l_u + s (l_c - l_u)) / T)

l_c and l_u are the frozen start's logits with the condition and without, s the guidance scale and T the temperature:
after it one pass samples what two did (Meng et al., arXiv 2210.03142, for diffusion). It is the guided prior of `va_pi`
without a reward: no sample is drawn and nothing decoded. Images that lost their condition learn the null distribution.
"""

from typing import Annotated

import torch
from pydantic import Field

from varpi import objective
from varpi.data import Batch
from varpi.methods import Outcome
from varpi.methods.teacher_forcing import GeneratorMethod, parts
from varpi.recipe import Float, MethodSection, Recipe, Share


class Settings(MethodSection):
    """Distilled guidance."""

    needs = ("generator", "tokenizer")
    pretrained = True

    guidance: Annotated[Float, Field(gt=1)] = 1.5
    """s, the scale that moves into the weights: sample without guidance afterwards."""
    teacher_temperature: Annotated[Float, Field(gt=0)] = 1.0
    """T, the temperature that moves into the weights: sample at 1 afterwards."""
    condition_drop: Share = 0.1
    """Probability that an image's condition is replaced by the null condition."""


class Guided(GeneratorMethod):
    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """Cross-entropy under the guided start for B images, in nats per token."""
        targets = self.encode(batch)
        condition = self.model.drop_condition(batch.condition, self.drop(batch, step))
        with self.stages("transformer"):
            start, null = (self.start_logits(targets, given) for given in (condition, self.null(condition)))
            logits = self.logits(self.model.train(), targets, condition)
        with self.stages("loss"):
            target = objective.guide(start, null, self.settings.guidance) / self.settings.teacher_temperature
            loss = objective.guided_prior(logits, target)
            with torch.no_grad():
                cross_entropy = objective.prior_loss(logits, targets)
        return Outcome(loss, {"guided_cross_entropy": loss.detach(), "cross_entropy": cross_entropy})


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> Guided:
    return Guided(**parts(recipe, num_classes, device, reference=True))
