"""The paper's other baseline (arXiv 2512.19680, C.2, Eq. 34-38): the tokenizer's decoder learns to read the generator.

    images -> encode x* -> corrupt x̃* -> logits of the frozen generator -> sample x -> decode -> MSE + λ LPIPS

The decoder, with the convolution before it, is trained; encoder, codes and generator stay, so that the result is a
tokenizer of the same tokens. No gradient goes through the choice of tokens. There is no discriminator: where tokens
leave the image open, its mean is what is learned, and that is a blur (as in Fig. 7).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.errors import VarpiError
from varpi.generators import Generator
from varpi.methods import Outcome
from varpi.methods.rewards import Distances, load_reward_network
from varpi.methods.teacher_forcing import GeneratorMethod, parts
from varpi.objective.rewards import Perceptual
from varpi.recipe import MethodSection, Recipe, Share
from varpi.runtime.processes import autocast
from varpi.runtime.randomness import Stream
from varpi.tokenizers import VQ, Tokenizer
from varpi.weights import save_tokenizer


class Settings(MethodSection):
    """Post-training of the tokenizer's decoder on the generator's teacher-forced samples (VA-π's paper, C.2)."""

    needs = ("generator", "tokenizer")
    pretrained = True
    trains = "tokenizer"

    context_noise: Share = 0.0
    """ξ, probability that a context token is replaced (Eq. 28)."""
    reward: Distances = Distances()
    """What is measured between the decoded sample and its image; the loss is minus this reward."""

    def check(self, recipe: Recipe) -> None:
        if recipe.lora is not None:
            raise ValueError("lora adapts generators; method tokenizer_decoder leaves the generator as it is")


class TokenizerDecoder(GeneratorMethod):
    """Here the tokenizer is trained, and the generator frozen."""

    model: VQ

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        settings: Any,
        *,
        perceptual: Perceptual | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(generator, tokenizer, settings, **shared)
        if not isinstance(tokenizer, VQ):
            raise VarpiError(
                f"tokenizer.source: is a {type(tokenizer).__name__}; method tokenizer_decoder trains a VQ's decoder"
            )
        self.model, self.generator = tokenizer, generator.requires_grad_(False).eval()
        self.frozen = (generator,)
        for part in (tokenizer.post_quant_conv, tokenizer.decoder):
            part.requires_grad_(True)
        self.perceptual = perceptual

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """The distances between B images and one decoded sample of each."""
        distances = self._distances(batch, step)
        weights = self.settings.reward
        loss = torch.stack([getattr(weights, f"{name}_weight") * value for name, value in distances.items()]).sum()
        return Outcome(loss, {name: value.detach() for name, value in distances.items()})

    def validation_loss(self, batch: Batch) -> Tensor:
        """The loss of held-out images; their samples are drawn from the same numbers every time."""
        return self.loss(batch, 0).loss

    def save(self, path: Path, state_dict: dict[str, Tensor], extra: dict[str, str]) -> None:
        save_tokenizer(self.model, path, state_dict=state_dict, extra=extra)

    def sample(self, batch: Batch, step: int) -> Tensor:
        """Int64 (B,N), every token drawn from the frozen generator's prediction in the (noisy) true context."""
        targets = context = self.encode(batch)
        if self.settings.context_noise > 0:
            uniforms = self.uniforms(batch, step, (targets.shape[1], 2), Stream.CONTEXT_NOISE)
            context = objective.corrupt(
                targets, self.settings.context_noise, self.generator.vocab_size, uniforms=uniforms
            )
        with self.stages("transformer"), torch.no_grad():
            logits = self.logits(self.generator, context, batch.condition)
        with self.stages("sample"):
            uniforms = self.uniforms(batch, step, (1, targets.shape[1]), Stream.SAMPLES)
            return objective.sample_tokens(logits, 1, uniforms=uniforms)[:, 0]

    def _distances(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars by name, means over the images; only those of positive weight."""
        samples, weights, found = self.sample(batch, step), self.settings.reward, {}
        with self.stages("decode"), autocast(self.device, self.precision):
            images = self.model.decode(samples)
        if weights.mse_weight > 0:
            found["mse"] = (images - batch.images).square().mean()
        if weights.l1_weight > 0:
            found["l1"] = (images - batch.images).abs().mean()
        if self.perceptual is not None:
            with self.stages("perceptual"), autocast(self.device, self.precision):
                with torch.no_grad():
                    target = self.perceptual.maps(batch.images)
                found["perceptual"] = self.perceptual.distance(self.perceptual.maps(images), target).mean()
        return found


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> TokenizerDecoder:
    settings = recipe.method
    assert isinstance(settings, Settings)
    perceptual = load_reward_network(settings.reward, device)
    return TokenizerDecoder(**parts(recipe, num_classes, device), perceptual=perceptual)
