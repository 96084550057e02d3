"""Plain teacher-forced training: the cross-entropy of an image's own tokens, each under the true ones before it.

What generators are pretrained with, and the control that any post-training must beat at equal steps.
"""

from typing import Any

from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.data.opening import open_training_data
from varpi.methods import Outcome
from varpi.methods.teacher_forcing import GeneratorMethod, parts
from varpi.methods.token_cache import cached_tokens
from varpi.recipe import MethodSection, Recipe, Share


class Settings(MethodSection):
    """Plain teacher-forced training: cross-entropy of the true tokens under the true context."""

    needs = ("generator", "tokenizer")

    condition_drop: Share = 0.1
    """Probability that an image's condition is replaced by the null condition."""
    token_cache: str | None = None
    """Folder for the tokens of all training images, made once for a tokenizer and its data; none: in every step."""

    def check(self, recipe: Recipe) -> None:
        if self.token_cache is not None and recipe.data.stream:
            raise ValueError("method.token_cache needs data that can be looked up; leave out one of it and data.stream")


class NextToken(GeneratorMethod):
    """tokens: int (n,N), of every image of the training data, by its index; without them each step encodes its own."""

    def __init__(self, *args: Any, tokens: Tensor | None = None, **shared: Any) -> None:
        super().__init__(*args, **shared)
        self.tokens = tokens

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """Mean cross-entropy per token, in nats."""
        targets = self.encode(batch)
        condition = self.model.drop_condition(batch.condition, self.drop(batch, step))
        with self.stages("transformer"):
            loss = objective.prior_loss(self.logits(self.model.train(), targets, condition), targets)
        return Outcome(loss, {"cross_entropy": loss.detach()})

    def encode(self, batch: Batch) -> Tensor:
        if self.tokens is None:
            return super().encode(batch)
        tokens = self.tokens[batch.indices]
        if tokens.min() < 0:  # of an image that could not be read when the cache was made, and now can
            return super().encode(batch)
        return tokens.long().to(self.device)


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> NextToken:
    settings = recipe.method
    assert isinstance(settings, Settings)
    shared = parts(recipe, num_classes, device)
    tokens = None
    if settings.token_cache is not None:
        tokens = cached_tokens(
            open_training_data(recipe.data),
            shared["tokenizer"],
            settings.token_cache,
            image_size=recipe.data.image_size,
            device=device,
        )
    return NextToken(**shared, tokens=tokens)
