"""VA-π: post-training of an autoregressive image generator by a pixel-space reward (arXiv 2512.19680, Fig. 2).

    images -> encode x* -> corrupt x̃* -> logits (the only transformer pass) -> sample G -> decode -> reward
           -> group advantage -> clipped policy loss + β · cross-entropy(x* | x̃*), both from the same logits

What it leaves out of the released code: repeating each image G times through the transformer (all G samples share
one context, so one set of logits serves them all), and the reference model that the released code runs without using.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.generators import Generator
from varpi.methods import Outcome
from varpi.methods.rewards import Reward, load_reward_network, pixel_rewards
from varpi.objective.rewards import Perceptual
from varpi.recipe import Float, Int, MethodSection, Recipe, Section, Share, Weight
from varpi.runtime.processes import autocast
from varpi.runtime.randomness import Stream, uniforms
from varpi.runtime.stages import Stages
from varpi.tokenizers import Tokenizer
from varpi.weights import save_generator
from varpi.weights.pair import load_pair, open_generator


class Compat(Section):
    """Where the released code departs from the paper; see docs/paper_map.md."""

    uniform_noise: bool = False
    """Context noise draws from all codes, the true one included (paper Eq. 28 excludes it)."""
    rollout_in_eval: bool = False
    """Sample from a separate pass without dropout, so that the first ratio compares two different networks."""


class Settings(MethodSection):
    """VA-π (arXiv 2512.19680)."""

    needs = ("generator", "tokenizer")
    pretrained = True
    reuses_rollouts = True

    group_size: Annotated[Int, Field(ge=2, le=2**12)] = 8
    """G, samples per image; advantages are relative to the group."""
    context_noise: Share = 0.0
    """ξ, probability that a context token is replaced (Eq. 28)."""
    prior: Literal["cross_entropy", "kl"] = "cross_entropy"
    """What holds the generator to its data: cross-entropy of true tokens (Eq. 9), or KL to a frozen copy (Fig. 4)."""
    prior_weight: Weight = 0.1
    """β (Eq. 11); 0 leaves the prior out, and with it the frozen copy."""
    clip_range: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    """ε of the clipped ratio (Eq. 11)."""
    advantage_clip: Annotated[Float, Field(gt=0)] = 5.0
    """Advantages are clamped to this magnitude."""
    policy_mode: Literal["train", "eval"] = "train"
    """Whether the generator's dropout is on in the pass that is differentiated."""
    condition_drop: Share = 0.1
    """Probability that an image's condition is replaced by the null condition."""
    reward: Reward = Reward()
    compat: Compat = Compat()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.compat.rollout_in_eval and self.policy_mode == "eval":
            raise ValueError("compat.rollout_in_eval needs policy_mode: train; in eval mode both passes are the same")
        if self.compat.uniform_noise and self.context_noise == 0:
            raise ValueError("compat.uniform_noise is set but context_noise is 0")
        return self


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
    advantages: Tensor
    """Float32 (B,G)."""
    old_log_probs: Tensor | None = None
    """Float32 (B,G,N), of the samples when they were drawn; none until the pass that drew them has been scored."""
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
        if rollout is not None:
            return self.score(self._pass(rollout.context, rollout.condition), rollout)
        targets, context, condition = self._teach(batch, step)
        logits = self._pass(context, condition)
        rollout, metrics = self.roll_out(logits.detach(), targets, context, condition, batch, step)
        outcome = self.score(logits, rollout)
        with self.stages("loss"):
            entropy = objective.entropy(logits.detach())
        return Outcome(outcome.loss, {**metrics, **outcome.metrics, "entropy": entropy}, rollout)

    def roll_out(
        self, logits: Tensor, targets: Tensor, context: Tensor, condition: Any, batch: Batch, step: int
    ) -> tuple[Rollout, dict[str, Tensor]]:
        """Sample G sequences an image from `logits` (B,N,V), without gradient, decode and reward them.

        Returns the rollout and its rewards' means, to log.
        """
        settings = self.settings
        if settings.compat.rollout_in_eval:
            logits = self._logits_in_eval(context, condition)
        samples = self._sample(logits, batch, step)
        rewards = self._rewards(samples, batch.images)
        advantages = objective.group_advantages(rewards.total, clip=settings.advantage_clip)
        rollout = Rollout(targets, context, condition, samples, advantages)
        if settings.compat.rollout_in_eval:
            rollout.old_log_probs = objective.token_log_probs(logits, samples)
        if self.reference is not None:
            with self.stages("transformer"), torch.no_grad():
                reference_logits = self._logits(self.reference, context, condition)
                rollout.reference_log_probs = objective.token_log_probs(reference_logits, samples)
        metrics = {
            "reward_mean": rewards.total.mean(),
            "reward_std": rewards.total.std(dim=1).mean(),
            "equal_groups": (advantages == 0).all(dim=1).float().mean(),
        }
        return rollout, metrics | {name: part.mean() for name, part in rewards.parts.items()}

    def score(self, logits: Tensor, rollout: Rollout) -> Outcome:
        """The clipped policy term and the prior (Eq. 11) of a rollout; `logits` (B,N,V) carry the gradient."""
        settings = self.settings
        with self.stages("loss"):
            # Samples and targets at once, so that the logits get a single gradient.
            tokens = torch.cat([rollout.samples, rollout.targets[:, None]], dim=1)
            log_probs = objective.token_log_probs(logits, tokens)
            log_probs, true_log_probs = log_probs[:, :-1], log_probs[:, -1]
            if rollout.old_log_probs is None:
                rollout.old_log_probs = log_probs.detach()  # of this very pass, so that the first ratio is exactly 1
            loss, metrics = objective.policy_loss(
                log_probs, rollout.old_log_probs, rollout.advantages, clip_range=settings.clip_range
            )
            cross_entropy = -true_log_probs.mean()
            metrics = {"policy_loss": loss.detach(), **metrics, "cross_entropy": cross_entropy.detach()}
            if settings.prior_weight > 0:
                prior = cross_entropy
                if settings.prior == "kl":
                    assert rollout.reference_log_probs is not None
                    prior = objective.kl_prior(log_probs, rollout.reference_log_probs)
                loss = loss + settings.prior_weight * prior
                metrics["prior_loss"] = prior.detach()
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

    def _pass(self, context: Tensor, condition: Any) -> Tensor:
        """The one pass that carries the gradient."""
        with self.stages("transformer"):
            self.model.train(self.settings.policy_mode == "train")
            return self._logits(self.model, context, condition)

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
        with self.stages("reward"):
            return pixel_rewards(self.settings.reward, self.tokenizer, samples, images, self.perceptual)

    def _uniforms(self, batch: Batch, step: int, shape: tuple[int, ...], stream: Stream) -> Tensor:
        return uniforms(self.seed, step, batch.positions, shape, stream=stream, device=self.device)


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> VaPi:
    settings = recipe.method
    assert isinstance(settings, Settings)
    pair = load_pair(recipe, num_classes, device)
    perceptual = load_reward_network(settings.reward, device)
    reference = None
    if settings.prior == "kl" and settings.prior_weight > 0:
        reference = open_generator(recipe, device)
        reference.requires_grad_(False).eval()
    return VaPi(
        pair.generator,
        pair.tokenizer,
        settings,
        seed=recipe.seed,
        precision=recipe.training.precision,
        perceptual=perceptual,
        reference=reference,
        device=device,
    )
