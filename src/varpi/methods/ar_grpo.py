"""AR-GRPO (arXiv 2508.06924): GRPO on whole images that the generator makes alone, scored by rewards from outside.

    conditions -> G free-running rollouts each, with guidance -> decode -> rewards -> (reward - mean) / (std + 1e-4)
               -> clipped policy loss + β · KL to the frozen start, on log-probabilities without guidance

What VA-π's paper compares with (Table 1, Fig. 3). Dropout is off throughout, so that the first ratio is exactly 1. Of
the data only the conditions are looked at. Left out: the released code's quantized rewards, image quality (MANIQA) and
language models as judges, each of which a function or a server of yours can be (`rewards`).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.data.pixels import to_uint8
from varpi.errors import VarpiError
from varpi.methods import Outcome
from varpi.methods.image_rewards import ImageRewards, RewardTerms
from varpi.methods.teacher_forcing import GeneratorMethod, parts
from varpi.recipe import BatchSize, Float, Int, MethodSection, Recipe, Weight
from varpi.runtime.processes import autocast
from varpi.runtime.randomness import Stream
from varpi.sampling.generate import generate_with
from varpi.sampling.settings import Sampling


class Settings(MethodSection):
    """AR-GRPO (arXiv 2508.06924): free-running rollouts, rewarded from outside."""

    needs = ("generator", "tokenizer")
    pretrained = True
    reuses_rollouts = True

    rewards: RewardTerms
    """What scores the images: any of clip, hps, classifier, function, http, each with a weight."""
    group_size: Annotated[Int, Field(ge=2, le=2**12)] = 8
    """G, images made for each condition; advantages are relative to the group."""
    guidance_scale: Annotated[Float, Field(ge=0)] = 2.0
    """Of the rollouts; up to 1 is no guidance. The released code's: 2 classes, 4 text."""
    kl_weight: Weight = 0.1
    """β of the KL to the frozen start (k3); 0 needs no frozen copy. The released code's: 0.1 classes, 1 text."""
    clip_range: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    """ε of the clipped ratio."""
    rollout_batch: BatchSize = 64
    """Images made and decoded at once; bounds memory, changes no number but by rounding."""


@dataclass
class FreeRollout:
    """What was generated for a micro-batch. B conditions, G images each, N tokens."""

    samples: Tensor
    """Int64 (BG,N), the groups one after the other."""
    condition: Any
    """Of each sample."""
    advantages: Tensor
    """Float32 (B,G)."""
    old_log_probs: Tensor | None = None
    """Float32 (B,G,N), of the first pass over the samples; none until then."""
    reference_log_probs: Tensor | None = None
    """Float32 (B,G,N), under the frozen start; with a KL only."""


class ArGrpo(GeneratorMethod):
    def __init__(self, *args: Any, rewards: ImageRewards, **shared: Any) -> None:
        super().__init__(*args, **shared)
        self.rewards = rewards

    def loss(self, batch: Batch, step: int, rollout: FreeRollout | None = None) -> Outcome:
        """The policy loss and the KL of B conditions. The first call of a batch generates; later ones reuse it."""
        settings, metrics = self.settings, {}
        self.model.eval()
        if rollout is None:
            rollout, metrics = self.roll_out(batch, step)
        with self.stages("transformer"):
            logits = self.logits(self.model, rollout.samples, rollout.condition)
        with self.stages("loss"):
            log_probs = self._log_probs(logits, rollout.samples)
            if rollout.old_log_probs is None:
                rollout.old_log_probs = log_probs.detach()
            loss, found = objective.policy_loss(
                log_probs, rollout.old_log_probs, rollout.advantages, clip_range=settings.clip_range
            )
            metrics |= {"policy_loss": loss.detach(), **found, "entropy": objective.entropy(logits.detach())}
            if rollout.reference_log_probs is not None:
                kl = objective.kl_prior(log_probs, rollout.reference_log_probs)
                loss = loss + settings.kl_weight * kl
                metrics["kl"] = kl.detach()
        return Outcome(loss, metrics, rollout)

    @torch.no_grad()
    def roll_out(self, batch: Batch, step: int) -> tuple[FreeRollout, dict[str, Tensor]]:
        """G images of every condition, their rewards and advantages, and what to log of them."""
        settings, group = self.settings, self.settings.group_size
        each = torch.arange(len(batch.images), device=self.device).repeat_interleave(group)
        condition = batch.condition[each]  # pyright: ignore[reportArgumentType, reportCallIssue]  (a generator's own)
        with self.stages("generate"), autocast(self.device, self.precision):
            draws = self.uniforms(batch, step, (group, self.model.num_tokens), Stream.SAMPLES).flatten(0, 1)
            sampling = Sampling(guidance_scale=settings.guidance_scale)
            samples = generate_with(self.model, condition, sampling, draws=draws, batch_size=settings.rollout_batch)
        with self.stages("decode"):
            images = [to_uint8(self.tokenizer.decode(part)) for part in samples.split(settings.rollout_batch)]
        with self.stages("reward"):
            pixels = torch.cat([torch.from_numpy(part) for part in images]).permute(0, 3, 1, 2).contiguous()
            total, scores = self.rewards(pixels, self._asked(batch, each.cpu()))
            rewards = total.to(self.device).view(-1, group)
            advantages = objective.group_advantages(rewards, clip=math.inf, eps=1e-4)
        rollout = FreeRollout(samples, condition, advantages)
        if settings.kl_weight > 0:
            with self.stages("transformer"):
                rollout.reference_log_probs = self._log_probs(self.start_logits(samples, condition), samples)
        metrics = {"reward_mean": rewards.mean(), "reward_std": rewards.std(dim=1).mean()}
        metrics["equal_groups"] = (advantages == 0).all(dim=1).float().mean()
        return rollout, metrics | {f"reward_{name}": score.mean() for name, score in scores.items()}

    def _log_probs(self, logits: Tensor, samples: Tensor) -> Tensor:
        """(B,G,N) from logits (BG,N,V) and their samples (BG,N)."""
        log_probs = objective.token_log_probs(logits, samples[:, None])[:, 0]
        return log_probs.unflatten(0, (-1, self.settings.group_size))

    def _asked(self, batch: Batch, each: Tensor) -> Tensor | list[str]:
        """What each sample was asked to be: class ids, or captions."""
        if batch.captions is not None:
            return [batch.captions[i] for i in each.tolist()]
        assert isinstance(batch.condition, Tensor)
        return batch.condition.cpu()[each]


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> ArGrpo:
    settings = recipe.method
    assert isinstance(settings, Settings)
    if num_classes is None and recipe.data.caption_features is not None:
        raise VarpiError("ar_grpo scores images with their captions, which data.caption_features does not have")
    shared = parts(recipe, num_classes, device, reference=settings.kl_weight > 0)
    return ArGrpo(**shared, rewards=ImageRewards(settings.rewards, shared["generator"], device))
