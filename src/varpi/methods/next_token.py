"""Plain teacher-forced training: the cross-entropy of an image's own tokens, each under the true ones before it.

What generators are pretrained with, and the control that any post-training must beat at equal steps.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.generators import Generator
from varpi.methods import Outcome
from varpi.recipe import MethodSection, Recipe, Share
from varpi.runtime.processes import autocast
from varpi.runtime.randomness import Stream, uniforms
from varpi.runtime.stages import Stages
from varpi.tokenizers import Tokenizer
from varpi.weights import save_generator
from varpi.weights.pair import load_pair


class Settings(MethodSection):
    """Plain teacher-forced training: cross-entropy of the true tokens under the true context."""

    needs = ("generator", "tokenizer")

    condition_drop: Share = 0.1
    """Probability that an image's condition is replaced by the null condition."""


class NextToken:
    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        seed: int = 0,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        self.model: Any = generator
        self.tokenizer = tokenizer
        self.settings = settings
        self.seed = seed
        self.precision = precision
        self.device = device
        self.frozen: tuple[Any, ...] = ()
        self.stages = Stages(device)

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """Mean cross-entropy per token, in nats."""
        self.model.train()
        with self.stages("encode"):
            targets = self.tokenizer.encode(batch.images)
        condition = batch.condition
        if self.settings.condition_drop > 0:
            draws = uniforms(self.seed, step, batch.positions, (), stream=Stream.CONDITION_DROP, device=self.device)
            condition = self.model.drop_condition(condition, draws < self.settings.condition_drop)
        with self.stages("transformer"):
            loss = self._cross_entropy(targets, condition)
        return Outcome(loss, {"cross_entropy": loss.detach()})

    def validation_loss(self, batch: Batch) -> Tensor:
        self.model.eval()
        return self._cross_entropy(self.tokenizer.encode(batch.images), batch.condition)

    def save(self, path: Path, state_dict: dict[str, Tensor], extra: dict[str, str]) -> None:
        save_generator(self.model, path, state_dict=state_dict, extra=extra)

    def _cross_entropy(self, targets: Tensor, condition: Any) -> Tensor:
        with autocast(self.device, self.precision):
            logits = self.model.logits(targets, condition)
        return objective.prior_loss(logits, targets)


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> NextToken:
    assert isinstance(recipe.method, Settings)
    pair = load_pair(recipe, num_classes, device)
    return NextToken(
        pair.generator,
        pair.tokenizer,
        recipe.method,
        seed=recipe.seed,
        precision=recipe.training.precision,
        device=device,
    )
