"""What methods that train a generator on images' tokens share: targets, conditions, passes, validation, saving."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.generators import Generator
from varpi.recipe import Recipe
from varpi.runtime.processes import autocast
from varpi.runtime.randomness import Stream, uniforms
from varpi.runtime.stages import Stages
from varpi.tokenizers import Tokenizer
from varpi.weights import save_generator
from varpi.weights.lora import without_adapters
from varpi.weights.pair import load_pair, open_generator


class GeneratorMethod:
    """The generator is trained, the tokenizer frozen. `reference` is the generator's frozen start, where one is needed.

    With LoRA there is none: the start is the generator without its adapters.

    Shapes: B images, N tokens, V vocabulary.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        settings: Any,
        *,
        reference: Generator | None = None,
        seed: int = 0,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        self.model: Any = generator
        self.tokenizer = tokenizer
        self.settings = settings
        self.reference: Any = reference
        self.seed = seed
        self.precision = precision
        self.device = device
        self.frozen: tuple[Any, ...] = (reference,) if reference is not None else ()
        self.stages = Stages(device)

    def validation_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of held-out images' tokens under their true context, in nats per token."""
        self.model.eval()
        targets = self.tokenizer.encode(batch.images)
        return objective.prior_loss(self.logits(self.model, targets, batch.condition), targets)

    def save(self, path: Path, state_dict: dict[str, Tensor], extra: dict[str, str]) -> None:
        save_generator(self.model, path, state_dict=state_dict, extra=extra)

    def encode(self, batch: Batch) -> Tensor:
        """Int64 (B,N), the images' own tokens x*."""
        with self.stages("encode"):
            return self.tokenizer.encode(batch.images)

    def logits(self, generator: Any, tokens: Tensor, condition: Any) -> Tensor:
        """(B,N,V) under teacher forcing, in the recipe's precision."""
        with autocast(self.device, self.precision):
            return generator.logits(tokens, condition)

    @torch.no_grad()
    def start_logits(self, tokens: Tensor, condition: Any) -> Tensor:
        """(B,N,V) of the generator as it was before training, without dropout and without gradient."""
        if self.reference is not None:
            return self.logits(self.reference, tokens, condition)
        was_training = self.model.training
        self.model.eval()
        with without_adapters(self.model):
            logits = self.logits(self.model, tokens, condition)
        self.model.train(was_training)
        return logits

    def drop(self, batch: Batch, step: int) -> Tensor:
        """Bool (B,): the images that lose their condition, the same for every method of a seed."""
        if self.settings.condition_drop == 0:
            return torch.zeros(len(batch.images), dtype=torch.bool, device=self.device)
        return self.uniforms(batch, step, (), Stream.CONDITION_DROP) < self.settings.condition_drop

    def null(self, condition: Any) -> Any:
        """The null condition of as many images."""
        every = torch.ones(len(condition), dtype=torch.bool, device=self.device)
        return self.model.drop_condition(condition, every)

    def uniforms(self, batch: Batch, step: int, shape: tuple[int, ...], stream: Stream) -> Tensor:
        """Float32 (B,*shape) in [0,1) that belong to the images."""
        return uniforms(self.seed, step, batch.positions, shape, stream=stream, device=self.device)


def parts(recipe: Recipe, num_classes: int | None, device: str, *, reference: bool = False) -> dict[str, Any]:
    """The arguments of a `GeneratorMethod`, loaded and checked; `reference`: so that it has `start_logits`."""
    pair = load_pair(recipe, num_classes, device)
    frozen = None
    if reference and recipe.lora is None:
        frozen = open_generator(recipe, device, reads_captions=False)
        frozen.requires_grad_(False).eval()
    return {
        "generator": pair.generator,
        "tokenizer": pair.tokenizer,
        "settings": recipe.method,
        "reference": frozen,
        "seed": recipe.seed,
        "precision": recipe.training.precision,
        "device": device,
    }
