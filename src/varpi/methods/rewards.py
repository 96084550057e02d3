"""The pixel reward that several methods share: its settings, the networks it needs, and the scoring of samples.

B images, G samples per image, N tokens per image.
"""

import math
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from varpi import objective
from varpi.networks.loading import load_perceptual
from varpi.networks.perceptual import LPIPS
from varpi.objective.rewards import Perceptual
from varpi.recipe import BatchSize, Section, Weight
from varpi.runtime.processes import autocast
from varpi.runtime.sizes import on_cpu
from varpi.tokenizers import Tokenizer


class Distances(Section):
    """Between images: a weighted sum of pixel and perceptual distances (Eq. 10). A weight of 0 computes nothing."""

    mse_weight: Weight = 1.0
    """Mean squared error over channels and pixels, images in [-1,1]."""
    perceptual_weight: Weight = 1.0
    """The paper's λp, of the perceptual distance."""
    l1_weight: Weight = 0.0
    """Of the mean absolute error over channels and pixels."""
    perceptual: Literal["lpips-vgg", "lpips-alex", "digits", "shapes"] = "lpips-vgg"
    """The network of the perceptual distance; `digits` and `shapes` are embedded."""
    perceptual_weights: str | None = None
    """File with the trunk of LPIPS; none: torch hub's cache, or a download."""

    @model_validator(mode="after")
    def _some_reward(self) -> Self:
        if self.mse_weight == self.perceptual_weight == self.l1_weight == 0:
            raise ValueError("every weight is 0; at least one must be positive")
        if self.perceptual_weights is not None and not (
            self.perceptual_weight > 0 and self.perceptual.startswith("lpips")
        ):
            raise ValueError("perceptual_weights is given but no LPIPS network is used")
        return self


class Reward(Distances):
    """Paper Eq. 10: minus the distances of decoded samples."""

    decode_batch: BatchSize = 16
    """Token sequences decoded at once, at most; bounds memory, changes no number."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the decoder and the perceptual network; in bf16 they take half the time, and advantages hardly change."""


def load_reward_network(reward: Distances, device: str) -> Perceptual | None:
    """The network of the perceptual distance; None when its weight is 0."""
    if reward.perceptual_weight == 0:
        return None
    return load_perceptual(reward.perceptual, reward.perceptual_weights, device)


def lower(reward: Reward, tokenizer: Tokenizer, perceptual: Perceptual | None) -> None:
    """Hold the decoder and LPIPS in bfloat16 if that is `reward.precision`; what has no such form autocast casts."""
    if reward.precision == "bf16":
        tokenizer.lower_decoder()
        if isinstance(perceptual, LPIPS):
            perceptual.lower()


@torch.no_grad()
def pixel_rewards(
    reward: Reward,
    tokenizer: Tokenizer,
    samples: Tensor,
    images: Tensor,
    perceptual: Perceptual | None,
    *,
    local: bool = False,
    energy: bool = False,
) -> objective.Rewards:
    """Rewards of samples, int64 (B,G,N), against their images (B,3,H,W) in [-1,1], decoded in `reward.precision`.

    local: also their maps. energy: the energy score. See `objective.score_samples`.
    """
    with autocast(images.device, reward.precision):
        return objective.score_samples(
            tokenizer.decode,
            samples,
            images,
            _weights(reward),
            perceptual=perceptual,
            chunk=_at_once(reward, images, samples.shape[1] if energy else 1),
            local=local,
            energy=energy,
        )


def code_rewards(
    reward: Reward,
    tokenizer: Tokenizer,
    samples: Tensor,
    images: Tensor,
    perceptual: Perceptual | None,
    *,
    energy: bool = False,
) -> tuple[objective.Rewards, Tensor]:
    """As `pixel_rewards`, with the errors' gradients at the samples' code vectors, float32 (B,G,N,C)."""
    side = math.isqrt(samples.shape[-1])
    codes = tokenizer.code_vectors()[samples].transpose(2, 3).unflatten(3, (side, side))
    with autocast(images.device, reward.precision):
        return objective.score_codes(
            tokenizer.decode_codes,
            codes,
            images,
            _weights(reward),
            perceptual=perceptual,
            chunk=_at_once(reward, images, samples.shape[1] if energy else 1),
            energy=energy,
        )


def _at_once(reward: Reward, images: Tensor, at_least: int) -> int:
    """`decode_batch`; on a CPU no more than one image of 256x256 or its like in pixels, which its caches want."""
    if not on_cpu(images):
        return reward.decode_batch
    return min(reward.decode_batch, max(at_least, 2**16 // images[0, 0].numel()))


def _weights(reward: Reward) -> objective.RewardWeights:
    return objective.RewardWeights(reward.mse_weight, reward.perceptual_weight, reward.l1_weight)
