"""Trains a small VQ tokenizer by reconstruction, enough to make the embedded pair again.

VQ-VAE (arXiv 1711.00937) with unit-norm latents and codes as LlamaGen's tokenizer has them. Left out: the adversarial
loss of the released tokenizers.
"""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from varpi.data import Batch
from varpi.errors import VarpiError
from varpi.methods import Outcome
from varpi.networks.loading import load_perceptual
from varpi.recipe import MethodSection, Recipe, Weight
from varpi.runtime.processes import autocast
from varpi.runtime.stages import Stages
from varpi.tokenizers import VQ
from varpi.weights import save_tokenizer
from varpi.weights.pair import open_tokenizer


class Settings(MethodSection):
    """Trains a VQ tokenizer by reconstruction (VQ-VAE, arXiv 1711.00937, with unit-norm codes)."""

    needs = ("tokenizer",)

    mse_weight: Weight = 1.0
    perceptual_weight: Weight = 0.0
    """Weight of the embedded `digits` perceptual distance."""
    commitment_weight: Weight = 0.25
    usage_weight: Weight = 0.0
    """Weight of the distance from each code to its nearest latent of the batch, which keeps all codes in use."""


class VqTokenizer:
    def __init__(
        self, tokenizer: VQ, settings: Settings, *, perceptual: Any = None, precision: str = "fp32", device: str = "cpu"
    ) -> None:
        self.model: Any = tokenizer
        self.settings = settings
        self.perceptual = perceptual
        self.precision = precision
        self.device = device
        self.frozen: tuple[Any, ...] = ()
        self.stages = Stages(device)

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """Reconstruction + ||sg(z) - e||² + commitment · ||z - sg(e)||², per image."""
        self.model.train()
        with self.stages("tokenizer"), autocast(self.device, self.precision):
            images, latents, codes = self.model(batch.images)
        mse = (images - batch.images).square().mean()
        codebook = (latents.detach() - codes).square().sum(1).mean()
        commitment = (latents - codes.detach()).square().sum(1).mean()
        loss = self.settings.mse_weight * mse + codebook + self.settings.commitment_weight * commitment
        metrics = {"mse": mse.detach(), "commitment": commitment.detach()}
        if self.settings.usage_weight > 0:
            vectors = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
            usage = 2 - 2 * (self.model.quantize.unit_codes() @ vectors.T).amax(dim=1).mean()
            loss = loss + self.settings.usage_weight * usage
            metrics["usage"] = usage.detach()
        if self.perceptual is not None:
            target = self.perceptual.maps(batch.images)
            distance = self.perceptual.distance(self.perceptual.maps(images), target).mean()
            loss = loss + self.settings.perceptual_weight * distance
            metrics["perceptual"] = distance.detach()
        return Outcome(loss, metrics)

    def validation_loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the reconstruction through the tokens."""
        self.model.eval()
        return F.mse_loss(self.model.decode(self.model.encode(batch.images)), batch.images)

    def save(self, path: Path, state_dict: dict[str, Tensor], extra: dict[str, str]) -> None:
        save_tokenizer(self.model, path, state_dict=state_dict, extra=extra)


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> VqTokenizer:
    settings = recipe.method
    assert isinstance(settings, Settings)
    assert recipe.tokenizer is not None
    tokenizer = open_tokenizer(recipe.tokenizer, device)
    if not isinstance(tokenizer, VQ):
        raise VarpiError(f"tokenizer.source: is a {type(tokenizer).__name__}; method vq_tokenizer trains a VQ")
    if recipe.data.image_size % tokenizer.downsample:
        raise VarpiError(
            f"data.image_size is {recipe.data.image_size}; this tokenizer needs a multiple of {tokenizer.downsample}"
        )
    perceptual = load_perceptual("digits", None, device) if settings.perceptual_weight > 0 else None
    return VqTokenizer(tokenizer, settings, perceptual=perceptual, precision=recipe.training.precision, device=device)
