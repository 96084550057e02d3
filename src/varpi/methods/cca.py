"""CCA: condition contrastive alignment (arXiv 2410.09347), guidance-free sampling from pairs of conditions.

    gap(x,c) = log π(x|c) - log π_start(x|c), summed over the N tokens
    loss = [ -mean log σ(β gap(x,c)) - mean w log σ(s β gap(x,c⁻)) ] / max(λ, 1)

c⁻ is a class drawn at random for the same image: w = λ and s = -1. Where both halves lost their condition, or c⁻ is the
true class, the pair is no contrast and counts as a positive: w = 1 and s = +1. The policy keeps its dropout, the frozen
start has none. Left out: storing the start's log-probabilities. As c⁻ is drawn anew for every visit of an image, they
would be needed of all K classes: K + 1 passes an image in advance to save two a visit.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.errors import VarpiError
from varpi.methods import Outcome
from varpi.methods.teacher_forcing import GeneratorMethod, parts
from varpi.recipe import Float, MethodSection, Recipe, Share, Weight
from varpi.runtime.randomness import Stream


class Settings(MethodSection):
    """CCA (arXiv 2410.09347), for generators of classes."""

    needs = ("generator", "tokenizer")
    pretrained = True

    beta: Annotated[Float, Field(gt=0)] = 0.02
    """β, the scale of the gaps."""
    negative_weight: Weight = 1000.0
    """λ, the weight of mismatched pairs: 1000 (LlamaGen B, XL, XXL), 300 (L), 500 (3B)."""
    condition_drop: Share = 0.1
    """Probability that both halves of a pair have the null condition."""


class Cca(GeneratorMethod):
    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """The contrast of true and random classes for B images."""
        targets, dropped = self.encode(batch), self.drop(batch, step)
        assert isinstance(batch.condition, Tensor)
        draws = self.uniforms(batch, step, (), Stream.NEGATIVE_CLASS)
        negative = (draws * self.model.num_classes).long()
        condition = torch.cat([batch.condition, negative])
        condition = self.model.drop_condition(condition, dropped.repeat(2))
        tokens = targets.repeat(2, 1)
        with self.stages("transformer"):
            start = log_likelihood(self.start_logits(tokens, condition), tokens)
            gaps = log_likelihood(self.logits(self.model.train(), tokens, condition), tokens) - start
        with self.stages("loss"):
            loss, metrics = contrast(
                *gaps.chunk(2),
                contrasting=~dropped & (negative != batch.condition),
                beta=self.settings.beta,
                negative_weight=self.settings.negative_weight,
            )
        return Outcome(loss, metrics)


def log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Float32 (B,) of whole images, in nats: logits (B,N,V) and their tokens int64 (B,N)."""
    return objective.token_log_probs(logits, tokens[:, None])[:, 0].sum(dim=1)


def contrast(
    gaps: Tensor, negative_gaps: Tensor, *, contrasting: Tensor, beta: float, negative_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss above from gaps (B,) of true and of drawn conditions, in nats; contrasting: bool (B,), true negatives.

    Returns the scalar and, detached, the mean gap of the true conditions and of the true negatives (0 without any).
    """
    signs = torch.where(contrasting, -1.0, 1.0)
    weights = torch.where(contrasting, negative_weight, 1.0)
    positive = F.logsigmoid(beta * gaps).mean()
    negative = (weights * F.logsigmoid(signs * beta * negative_gaps)).mean()
    loss = -(positive + negative) / max(negative_weight, 1.0)
    share = contrasting.float()
    metrics = {"gap": gaps.mean(), "negative_gap": (share * negative_gaps).sum() / share.sum().clamp(min=1)}
    return loss, {name: value.detach() for name, value in metrics.items()}


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> Cca:
    method = Cca(**parts(recipe, num_classes, device, reference=True))
    if method.model.num_classes is None:
        raise VarpiError("cca draws random classes as negatives; this generator is conditioned on text")
    return method
