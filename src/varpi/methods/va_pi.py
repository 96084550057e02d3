"""VA-π: post-training of an autoregressive image generator by a pixel-space reward (arXiv 2512.19680, Fig. 2).

    images -> encode x* -> corrupt x̃* -> logits (the only transformer pass) -> sample G -> decode -> reward
           -> group advantage -> clipped policy loss + β · cross-entropy(x* | x̃*), both from the same logits

What it leaves out of the released code: repeating each image G times through the transformer (all G samples share
one context, so one set of logits serves them all), and the reference model that the released code runs without using.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.generators import Generator
from varpi.methods import Outcome
from varpi.networks.classifier import load_perceptual
from varpi.objective.rewards import Perceptual
from varpi.recipe import Recipe
from varpi.recipe import VaPi as Settings
from varpi.runtime.processes import autocast
from varpi.runtime.randomness import Stream, uniforms
from varpi.runtime.stages import Stages
from varpi.tokenizers import Tokenizer
from varpi.weights import save_generator
from varpi.weights.pair import load_pair, open_generator


@dataclass
class Rollout:
    """What was sampled for a micro-batch, kept for later updates on it. B images, G samples, N tokens."""

    targets: Tensor
    """Int64 (B,N), the images' own tokens x*."""
    context: Tensor
    """Int64 (B,N), x̃*: the targets after context noise; what the generator sees."""
    condition: Any
    samples: Tensor
    """Int64 (B,G,N), drawn per position from the teacher-forced posterior."""
    old_log_probs: Tensor
    """Float32 (B,G,N), of the samples when they were drawn."""
    advantages: Tensor
    """Float32 (B,G)."""
    reference_log_probs: Tensor | None = None
    """Float32 (B,G,N), of the samples under the frozen reference; with the KL prior only."""


class VaPi:
    """The method. `reference` is the frozen copy for the KL prior and is given only with it."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        seed: int = 0,
        precision: str = "fp32",
        perceptual: Perceptual | None = None,
        reference: Generator | None = None,
        device: str = "cpu",
    ) -> None:
        self.model: Any = generator
        self.tokenizer = tokenizer
        self.settings = settings
        self.seed = seed
        self.precision = precision
        self.perceptual = perceptual
        self.reference = reference
        self.device = device
        self.frozen: tuple[Any, ...] = (reference,) if reference is not None else ()
        self.stages = Stages(device)

    def loss(self, batch: Batch, step: int, rollout: Rollout | None = None) -> Outcome:
        """Paper Eq. 9-11 for B images. The first call of a batch samples; later ones reuse its rollout."""
        settings, metrics = self.settings, {}
        first = rollout is None
        reference_log_probs = None
        if rollout is None:
            targets, context, condition = self._teach(batch, step)
        else:
            targets, context, condition = rollout.targets, rollout.context, rollout.condition

        with self.stages("transformer"):
            self.model.train(settings.policy_mode == "train")
            logits = self._logits(self.model, context, condition)
        behaviour = logits.detach()
        if rollout is None:
            if settings.compat.rollout_in_eval:
                behaviour = self._logits_in_eval(context, condition)
            samples = self._sample(behaviour, batch, step)
            rewards = self._rewards(samples, batch.images)
            advantages = objective.group_advantages(rewards.total, clip=settings.advantage_clip)
            metrics = {"reward_mean": rewards.total.mean(), "reward_std": rewards.total.std(dim=1).mean()}
            metrics |= {name: part.mean() for name, part in rewards.parts.items()}
            if self.reference is not None:
                with self.stages("transformer"), torch.no_grad():
                    reference_logits = self._logits(self.reference, context, condition)
                    reference_log_probs = objective.token_log_probs(reference_logits, samples)
                    del reference_logits
        else:
            samples, advantages = rollout.samples, rollout.advantages

        with self.stages("loss"):
            log_probs = objective.token_log_probs(logits, torch.cat([samples, targets[:, None]], dim=1))
            log_probs, true_log_probs = log_probs[:, :-1], log_probs[:, -1]
            if rollout is None:
                old = log_probs.detach()  # of this very pass, so that the first ratio is exactly 1
                if settings.compat.rollout_in_eval:
                    old = objective.token_log_probs(behaviour, samples)
                rollout = Rollout(targets, context, condition, samples, old, advantages, reference_log_probs)
            policy, policy_metrics = objective.policy_loss(
                log_probs, rollout.old_log_probs, advantages, clip_range=settings.clip_range
            )
            loss = policy
            metrics |= {"policy_loss": policy.detach(), **policy_metrics}
            cross_entropy = -true_log_probs.mean()
            metrics["cross_entropy"] = cross_entropy.detach()
            if settings.prior_weight > 0:
                prior = cross_entropy
                if settings.prior == "kl":
                    assert rollout.reference_log_probs is not None
                    prior = objective.kl_prior(log_probs, rollout.reference_log_probs)
                loss = loss + settings.prior_weight * prior
                metrics["prior_loss"] = prior.detach()
            if first:
                metrics["entropy"] = objective.entropy(logits.detach())
        return Outcome(loss, metrics, rollout)

    def validation_loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of held-out images' tokens under their true context."""
        self.model.eval()
        targets = self.tokenizer.encode(batch.images)
        return objective.prior_loss(self._logits(self.model, targets, batch.condition), targets)

    def save(self, path: Path, state_dict: dict[str, Tensor], extra: dict[str, str]) -> None:
        save_generator(self.model, path, state_dict=state_dict, extra=extra)

    def _teach(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Any]:
        """Targets x*, noisy context x̃* (Eq. 28) and the condition, dropped for some images."""
        with self.stages("encode"):
            targets = context = self.tokenizer.encode(batch.images)
        if self.settings.context_noise > 0:
            context = objective.corrupt(
                targets,
                self.settings.context_noise,
                self.model.vocab_size,
                uniforms=self._uniforms(batch, step, (targets.shape[1], 2), Stream.CONTEXT_NOISE),
                exclude_true=not self.settings.compat.uniform_noise,
            )
        condition = batch.condition
        if self.settings.condition_drop > 0:
            drop = self._uniforms(batch, step, (), Stream.CONDITION_DROP) < self.settings.condition_drop
            condition = self.model.drop_condition(condition, drop)
        return targets, context, condition

    def _logits(self, generator: Any, context: Tensor, condition: Any) -> Tensor:
        with autocast(self.device, self.precision):
            return generator.logits(context, condition)

    def _logits_in_eval(self, context: Tensor, condition: Any) -> Tensor:
        with self.stages("transformer"), torch.no_grad():
            self.model.eval()
            logits = self._logits(self.model, context, condition)
            self.model.train()
        return logits

    def _sample(self, logits: Tensor, batch: Batch, step: int) -> Tensor:
        with self.stages("sample"):
            shape = (self.settings.group_size, logits.shape[1])
            uniforms = self._uniforms(batch, step, shape, Stream.SAMPLES)
            return objective.sample_tokens(logits, self.settings.group_size, uniforms=uniforms)

    def _rewards(self, samples: Tensor, images: Tensor) -> objective.Rewards:
        reward = self.settings.reward
        with self.stages("reward"), torch.no_grad(), autocast(self.device, reward.precision):
            return objective.score_samples(
                self.tokenizer.decode,
                samples,
                images,
                objective.RewardWeights(reward.mse_weight, reward.perceptual_weight, reward.l1_weight),
                perceptual=self.perceptual,
                chunk=reward.decode_batch,
            )

    def _uniforms(self, batch: Batch, step: int, shape: tuple[int, ...], stream: Stream) -> Tensor:
        return uniforms(self.seed, step, batch.positions, shape, stream=stream, device=self.device)


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> VaPi:
    settings = recipe.method
    assert isinstance(settings, Settings)
    generator, tokenizer = load_pair(recipe, num_classes, device)
    reward = settings.reward
    perceptual = None
    if reward.perceptual_weight > 0:
        perceptual = load_perceptual(reward.perceptual, reward.perceptual_weights, device)
    reference = None
    if settings.prior == "kl" and settings.prior_weight > 0:
        reference = open_generator(recipe, device)
        reference.requires_grad_(False).eval()
    return VaPi(
        generator,
        tokenizer,
        settings,
        seed=recipe.seed,
        precision=recipe.training.precision,
        perceptual=perceptual,
        reference=reference,
        device=device,
    )
