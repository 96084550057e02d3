"""STE: the straight-through baseline of the paper (arXiv 2512.19680, C.1), reconstruction through one token path.

    codes = argmax of the logits forward, softmax(logits / τ) backward -> decode -> MSE + λ LPIPS against the image

Codes are the tokenizer's unit vectors, as it decodes them (the released code takes the raw ones, and a Gumbel sample
where the paper says argmax: `gumbel`). The gradient at the decoded codes is taken first, in parts, and then led
through the softmax: the same numbers as one graph, without its memory.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.methods import Outcome
from varpi.methods.rewards import Reward, code_rewards, load_reward_network, lower, pixel_rewards
from varpi.methods.teacher_forcing import GeneratorMethod, parts
from varpi.objective.rewards import Perceptual
from varpi.recipe import Float, MethodSection, Recipe, Share, Weight
from varpi.runtime.randomness import Stream


class Settings(MethodSection):
    """The straight-through estimator of the paper's comparison (C.1)."""

    needs = ("generator", "tokenizer")
    pretrained = True
    rewards_held_out = True

    temperature: Annotated[Float, Field(gt=0)] = 1.0
    """τ of the softmax in the backward pass."""
    gumbel: bool = False
    """Decode a sample (argmax of logits plus Gumbel noise, arXiv 1611.01144) and differentiate its own softmax."""
    prior_weight: Weight = 0.0
    """Weight of the true tokens' cross-entropy."""
    condition_drop: Share = 0.1
    """Probability that an image's condition is replaced by the null condition."""
    reward: Reward = Reward()
    """The reconstruction's distances; the loss is minus this reward."""


class Ste(GeneratorMethod):
    def __init__(self, *, perceptual: Perceptual | None = None, **shared: Any) -> None:
        super().__init__(**shared)
        self.perceptual = perceptual
        lower(self.settings.reward, self.tokenizer, perceptual)

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """The reconstruction error of B images, its gradient led straight through the choice of tokens."""
        settings = self.settings
        targets = self.encode(batch)
        condition = self.model.drop_condition(batch.condition, self.drop(batch, step))
        with self.stages("transformer"):
            logits = self.logits(self.model.train(), targets, condition)
        scores = logits
        if settings.gumbel:
            draws = self.uniforms(batch, step, tuple(logits.shape[1:]), Stream.SAMPLES).clamp_(min=2.0**-25)
            scores = logits - (-draws.log()).log()
        with self.stages("reward"):
            samples = scores.detach().argmax(dim=-1)[:, None]
            rewards, gradients = code_rewards(settings.reward, self.tokenizer, samples, batch.images, self.perceptual)
        with self.stages("loss"):
            error = -rewards.total.mean()
            through = objective.first_order_loss(
                scores / settings.temperature, self.tokenizer.code_vectors(), gradients
            )
            loss = error + through - through.detach()  # the value of the error, the gradient of the estimator
            cross_entropy = objective.prior_loss(logits, targets)
            metrics = {"reward_mean": -error, "cross_entropy": cross_entropy.detach()}
            metrics |= {name: part.mean() for name, part in rewards.parts.items()}
            if settings.prior_weight > 0:
                loss = loss + settings.prior_weight * cross_entropy
        return Outcome(loss, metrics)

    @torch.no_grad()
    def validation_reward(self, batch: Batch) -> Tensor:
        """Eq. 10 of held-out images: their distances to what the likeliest tokens decode into."""
        self.model.eval()
        logits = self.logits(self.model, self.tokenizer.encode(batch.images), batch.condition)
        scored = self.settings.reward, self.tokenizer, logits.argmax(dim=-1)[:, None], batch.images, self.perceptual
        return pixel_rewards(*scored).total.mean()


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> Ste:
    settings = recipe.method
    assert isinstance(settings, Settings)
    method = Ste(**parts(recipe, num_classes, device), perceptual=load_reward_network(settings.reward, device))
    method.tokenizer.code_vectors()  # refused now where there are none
    return method
