"""GFT: guidance-free training (arXiv 2501.15420), the conditional model as the guided half of a mixture.

    loss = cross-entropy of the true tokens under β l_c + (1 - β) l_u

l_c are the conditional logits, l_u the model's own null logits without gradient and without dropout. Where the mixture
fits the data, l_c = (l - (1 - β) l_u) / β: the logits of guidance scale 1 / β, sampled without guidance. Images that
lost their condition train l_u itself. Left out: a β drawn for every image and told to the model by an embedding, whose
weights no generator here has: what it trained would load nowhere else. One β, the one that is sampled at, needs none.
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
    """Guidance-free training (arXiv 2501.15420) at one fixed β."""

    needs = ("generator", "tokenizer")
    pretrained = True

    beta: Annotated[Float, Field(gt=0, le=1)] = 0.66
    """β, the share of the conditional logits; 1 / β is the guidance scale that moves into the weights."""
    condition_drop: Share = 0.1
    """Probability that an image's condition is replaced by the null condition."""


class Gft(GeneratorMethod):
    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """Cross-entropy of the mixture for B images, in nats per token."""
        targets, dropped = self.encode(batch), self.drop(batch, step)
        condition = self.model.drop_condition(batch.condition, dropped)
        with self.stages("transformer"):
            with torch.no_grad():
                null = self.logits(self.model.eval(), targets, self.null(condition)).float()
            conditional = self.logits(self.model.train(), targets, condition).float()
        with self.stages("loss"):
            share = torch.where(dropped, 1.0, self.settings.beta)[:, None, None]
            loss = objective.prior_loss(torch.lerp(null, conditional, share), targets)
            with torch.no_grad():
                cross_entropy = objective.prior_loss(conditional, targets)
        return Outcome(loss, {"mixture_cross_entropy": loss.detach(), "cross_entropy": cross_entropy})


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> Gft:
    return Gft(**parts(recipe, num_classes, device))
