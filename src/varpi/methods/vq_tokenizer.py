"""Trains a VQ tokenizer by reconstruction: the embedded digits' one, and one for photographs.

VQ-VAE (arXiv 1711.00937) with unit-norm latents and codes as LlamaGen's tokenizer has them. For photographs, as in
VQGAN (arXiv 2012.09841) and LlamaGen (arXiv 2406.06525): a perceptual distance, and a patch discriminator with hinge
losses. The weight of the adversarial loss is fixed, as in LlamaGen, not VQGAN's ratio of gradients.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from varpi.data import Batch
from varpi.errors import VarpiError
from varpi.methods import Outcome
from varpi.networks.discriminator import PatchDiscriminator
from varpi.networks.loading import load_perceptual
from varpi.objective.adversarial import adversarial_loss, discriminator_loss
from varpi.recipe import Int, MethodSection, Recipe, Weight
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
    perceptual: Literal["lpips-vgg", "lpips-alex", "digits", "shapes"] = "digits"
    """The network of the perceptual distance; `digits` and `shapes` are embedded."""
    perceptual_weights: str | None = None
    """File with the LPIPS trunk's weights; none: torch hub's cache, or a download."""
    commitment_weight: Weight = 0.25
    usage_weight: Weight = 0.0
    """Weight of the distance from each code to its nearest latent, which keeps all codes in use; nearest among the
    images that a process passes at once."""
    adversarial_weight: Weight = 0.0
    """Weight of what a patch discriminator says of the reconstructions; 0 builds none."""
    adversarial_start: Annotated[Int, Field(ge=0)] = 0
    """Steps before the discriminator and its say begin."""
    discriminator_channels: Annotated[Int, Field(ge=8, multiple_of=8)] = 64
    """Width of the discriminator's first layer."""
    discriminator_layers: Annotated[Int, Field(ge=1)] = 3
    """Its convolutions of stride 2: its patches are 16, 34 or 70 pixels wide with 1, 2 or 3."""

    @model_validator(mode="after")
    def _used(self) -> Self:
        if self.perceptual_weights is not None and not (
            self.perceptual_weight > 0 and self.perceptual.startswith("lpips")
        ):
            raise ValueError("perceptual_weights is given but no LPIPS network is used")
        if self.adversarial_start > 0 and self.adversarial_weight == 0:
            raise ValueError("adversarial_start is given but adversarial_weight is 0")
        return self


class Contest(nn.Module):
    """The tokenizer and its discriminator: one module, so that one optimizer and one checkpoint hold both."""

    def __init__(self, tokenizer: VQ, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.discriminator = discriminator

    def encode(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.decode(tokens)

    def forward(self, images: Tensor, judge: bool) -> tuple[Any, ...]:
        """The tokenizer's three outputs and, when it is to `judge`, three times the discriminator's logits.

        Of the images, of the reconstructions without a way back to the tokenizer, and of the reconstructions without
        one to the discriminator.
        """
        outputs = self.tokenizer(images)
        if not judge:
            return (*outputs, None, None, None)
        fake = outputs[0]
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return (
            *outputs,
            self.discriminator(images),
            self.discriminator(fake.detach()),
            functional_call(self.discriminator, frozen, fake),
        )


class VqTokenizer:
    def __init__(
        self,
        tokenizer: VQ,
        settings: Settings,
        *,
        perceptual: Any = None,
        discriminator: PatchDiscriminator | None = None,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        self.vq = tokenizer
        self.model: Any = tokenizer if discriminator is None else Contest(tokenizer, discriminator)
        self.tokenizer = self.model  # as a whole, which is what several processes shard
        self.settings = settings
        self.perceptual = perceptual
        self.precision = precision
        self.device = device
        self.frozen: tuple[Any, ...] = ()
        self.stages = Stages(device)

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """Reconstruction + ||sg(z) - e||² + commitment · ||z - sg(e)||², per image, and what else has a weight.

        The discriminator's own loss is added: it moves no weight of the tokenizer, as the adversarial loss moves none
        of the discriminator.
        """
        self.model.train()
        settings = self.settings
        real = given = fake = None
        with self.stages("tokenizer"), autocast(self.device, self.precision):
            if self.model is self.vq:
                images, latents, codes = self.model(batch.images)
            else:
                judge = step >= settings.adversarial_start
                images, latents, codes, real, given, fake = self.model(batch.images, judge)
        mse = (images - batch.images).square().mean()
        codebook = (latents.detach() - codes).square().sum(1).mean()
        commitment = (latents - codes.detach()).square().sum(1).mean()
        loss = settings.mse_weight * mse + codebook + settings.commitment_weight * commitment
        metrics = {"mse": mse.detach(), "commitment": commitment.detach()}
        if settings.usage_weight > 0:
            vectors = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
            usage = 2 - 2 * (self.vq.quantize.unit_codes() @ vectors.T).amax(dim=1).mean()
            loss = loss + settings.usage_weight * usage
            metrics["usage"] = usage.detach()
        if self.perceptual is not None:
            with self.stages("perceptual"), autocast(self.device, self.precision):
                with torch.no_grad():
                    target = self.perceptual.maps(batch.images)
                distance = self.perceptual.distance(self.perceptual.maps(images), target).mean()
            loss = loss + settings.perceptual_weight * distance
            metrics["perceptual"] = distance.detach()
        if real is not None and given is not None and fake is not None:
            judged, adversarial = discriminator_loss(real, given), adversarial_loss(fake)
            loss = loss + settings.adversarial_weight * adversarial + judged
            metrics |= {"adversarial": adversarial.detach(), "discriminator": judged.detach()}
        return Outcome(loss, metrics)

    def validation_loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the reconstruction through the tokens."""
        self.model.eval()
        return F.mse_loss(self.model.decode(self.model.encode(batch.images)), batch.images)

    def save(self, path: Path, state_dict: dict[str, Tensor], extra: dict[str, str]) -> None:
        """The tokenizer alone; nobody decodes with a discriminator."""
        if self.model is not self.vq:
            prefix = "tokenizer."
            state_dict = {k.removeprefix(prefix): value for k, value in state_dict.items() if k.startswith(prefix)}
        save_tokenizer(self.vq, path, state_dict=state_dict, extra=extra)


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
    perceptual = discriminator = None
    if settings.perceptual_weight > 0:
        perceptual = load_perceptual(settings.perceptual, settings.perceptual_weights, device)
    if settings.adversarial_weight > 0:
        discriminator = PatchDiscriminator(settings.discriminator_channels, settings.discriminator_layers).to(device)
    return VqTokenizer(
        tokenizer,
        settings,
        perceptual=perceptual,
        discriminator=discriminator,
        precision=recipe.training.precision,
        device=device,
    )
