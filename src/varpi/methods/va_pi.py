"""VA-π: post-training of an autoregressive image generator by a pixel-space reward (arXiv 2512.19680, Fig. 2).

    images -> encode x* -> corrupt x̃* -> logits (the only transformer pass) -> sample G -> decode -> reward
           -> group advantage -> clipped policy loss + β · cross-entropy(x* | x̃*), both from the same logits

Beyond the paper, each a setting: `credit: local` gives every token its own advantage, `estimator: first_order` takes
the error's gradient at the decoded codes in place of the policy term (`both`: beside it, unbiased), `baseline` and
`scale_by_std` change the advantage, `score: energy` does not reward the mean of what an image could be,
`context_noise_source: model` draws the noise from the generator itself, `prior: guided` distils guidance into the
prior.

What it leaves out of the released code: repeating each image G times through the transformer (all G samples share
one context, so one set of logits serves them all), and the reference model that the released code runs without using.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from varpi import objective
from varpi.data import Batch
from varpi.generators import Generator
from varpi.methods import Outcome
from varpi.methods.rewards import Reward, code_rewards, load_reward_network, lower, pixel_rewards
from varpi.methods.teacher_forcing import GeneratorMethod, parts
from varpi.objective.advantages import Baseline
from varpi.objective.rewards import Perceptual
from varpi.recipe import Float, Int, MethodSection, Recipe, Section, Share, Weight
from varpi.runtime.randomness import Stream, uniforms
from varpi.tokenizers import Tokenizer


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
    rewards_held_out = True

    group_size: Annotated[Int, Field(ge=1, le=2**12)] = 8
    """G, samples per image; advantages are relative to the group, so that the policy estimator needs at least 2."""
    estimator: Literal["policy", "first_order", "both"] = "policy"
    """How the reward reaches the logits: by the clipped policy gradient (Eq. 11); as the expected error, linear in the
    decoded code vectors (`varpi.objective.first_order_loss`); or by both, the second a control variate of the first,
    which leaves the gradient unbiased (`varpi.objective.residual_advantages`)."""
    score: Literal["distance", "energy"] = "distance"
    """What a reward is: minus a sample's distance to its image (Eq. 10), by which a blur does well; or the energy
    score, which also rewards being far from the image's other samples (`varpi.objective.score_samples`)."""
    credit: Literal["image", "local", "mixed"] = "image"
    """Of the policy estimator: advantages by image (Eq. 4), by token from the error around it, or the mean of both."""
    baseline: Baseline = "group_mean"
    """What a reward is held against: the mean of its group (Eq. 4), or of the others in it."""
    scale_by_std: bool = True
    """Divide advantages by their group's standard deviation (Eq. 4)."""
    context_noise: Share = 0.0
    """ξ, probability that a context token is replaced (Eq. 28)."""
    context_noise_end: Share | None = None
    """ξ of the last batch, towards which it changes by the same amount each batch; none: it stays as it is."""
    context_noise_source: Literal["uniform", "model"] = "uniform"
    """By what: any other token alike (Eq. 28), or the generator's own draw under the true context, at one more pass."""
    prior: Literal["cross_entropy", "kl", "guided"] = "cross_entropy"
    """What holds the generator to its data: cross-entropy of true tokens (Eq. 9), KL to a frozen copy (Fig. 4), or the
    cross-entropy under the frozen copy's guided distribution."""
    prior_guidance: Annotated[Float, Field(ge=1)] = 1.5
    """s, the scale of the guided prior. It moves into the weights: sample without guidance afterwards."""
    prior_weight: Weight = 0.1
    """β (Eq. 11); 0 leaves the prior out, and with it the frozen copy. With LoRA there is never one: the start is the
    generator without its adapters."""
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

    @property
    def follows_steps(self) -> bool:
        return self.context_noise_end is not None

    @property
    def has_start(self) -> bool:
        """Whether the prior needs the generator as it was before training."""
        return self.prior != "cross_entropy" and self.prior_weight > 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.compat.rollout_in_eval and self.policy_mode == "eval":
            raise ValueError("compat.rollout_in_eval needs policy_mode: train; in eval mode both passes are the same")
        noisy = max(self.context_noise, self.context_noise_end or 0.0) > 0
        if self.compat.uniform_noise and not noisy:
            raise ValueError("compat.uniform_noise is set but context_noise is 0")
        if self.context_noise_source == "model":
            if not noisy:
                raise ValueError("context_noise_source is model but context_noise is 0")
            if self.compat.uniform_noise:
                raise ValueError("compat.uniform_noise is set but context_noise_source is model")
        if self.estimator != "first_order" and self.group_size < 2:
            raise ValueError(f"group_size is 1; the {self.estimator} estimator compares at least 2 samples of an image")
        if self.estimator != "policy":
            default = type(self).model_fields
            for name in ("baseline", "scale_by_std", "advantage_clip"):
                if (value := getattr(self, name)) != default[name].default:
                    raise ValueError(f"{name} is {value}, which is for estimator policy; estimator is {self.estimator}")
        if self.score == "energy":
            if self.credit != "image":
                raise ValueError(f"credit is {self.credit}, but score energy has no error at a place")
            if not 2 <= self.group_size <= self.reward.decode_batch:
                raise ValueError(
                    f"score energy compares an image's samples, decoded together: group_size is {self.group_size}; "
                    f"it must be at least 2 and at most reward.decode_batch, {self.reward.decode_batch}"
                )
            if self.estimator == "both":
                raise ValueError("score is energy, where a reward depends on the other samples; estimator is both")
        if self.estimator == "both":
            if self.credit != "image":
                raise ValueError(f"credit is {self.credit}, but the estimator both has advantages by image alone")
            if self.compat.rollout_in_eval:
                raise ValueError("compat.rollout_in_eval makes ratios that are not 1, which estimator both needs")
        if self.estimator == "first_order":
            if self.credit != "image":
                raise ValueError(f"credit is {self.credit}, but the first_order estimator has no advantages to credit")
            if self.clip_range != type(self).model_fields["clip_range"].default:
                raise ValueError(f"clip_range is {self.clip_range}, which is for ratios; estimator is first_order")
            if self.prior == "kl":
                raise ValueError("prior is kl, which is estimated on the policy's samples; estimator is first_order")
            if self.compat.rollout_in_eval:
                raise ValueError("compat.rollout_in_eval is for ratios, and the first_order estimator has none")
        if self.prior != "guided" and self.prior_guidance != type(self).model_fields["prior_guidance"].default:
            raise ValueError(f"prior_guidance is set but prior is {self.prior}")
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
    advantages: Tensor | None = None
    """Float32 (B,G), or (B,G,N) where the credit is not by image; not with the first-order estimator."""
    gradients: Tensor | None = None
    """Float32 (B,G,N,C), of each sample's error at its code vectors; not with the policy estimator."""
    old_log_probs: Tensor | None = None
    """Float32 (B,G,N), of the samples when they were drawn; none until the pass that drew them has been scored."""
    reference_log_probs: Tensor | None = None
    """Float32 (B,G,N), of the samples under the frozen reference; with the KL prior only."""
    guided_logits: Tensor | None = None
    """Float32 (B,N,V), the frozen reference's own, guided; with the guided prior only."""


class VaPi(GeneratorMethod):
    """The method. The KL and the guided prior, and they alone, have the generator's frozen start."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        settings: Any,
        *,
        perceptual: Perceptual | None = None,
        batches: int = 1,
        **shared: Any,
    ) -> None:
        """batches: of the whole training, for what changes on the way."""
        super().__init__(generator, tokenizer, settings, **shared)
        self.perceptual = perceptual
        self.batches = batches
        lower(self.settings.reward, self.tokenizer, perceptual)

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

    @torch.no_grad()
    def validation_reward(self, batch: Batch) -> Tensor:
        """Eq. 10 of one sample of each held-out image, with training's context noise, from numbers of its own."""
        targets = context = self.tokenizer.encode(batch.images)
        draws = uniforms(
            self.seed, 0, batch.indices, (targets.shape[1], 3), stream=Stream.VALIDATION, device=self.device
        )
        if (rate := self._context_noise(self.batches - 1)) > 0:  # where it changes, that of the end
            context = self._noisy(targets, batch.condition, draws[..., :2], rate)
        samples = objective.sample_tokens(
            self._logits_in_eval(context, batch.condition), 1, uniforms=draws[:, None, :, 2]
        )
        scored = self.settings.reward, self.tokenizer, samples, batch.images, self.perceptual
        return pixel_rewards(*scored).total.mean()

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
        rollout = Rollout(targets, context, condition, samples)
        scored = settings.reward, self.tokenizer, samples, batch.images, self.perceptual
        energy = settings.score == "energy"
        with self.stages("reward"):
            if settings.estimator != "policy":
                rewards, rollout.gradients = code_rewards(*scored, energy=energy)
                if settings.estimator == "both":
                    vectors = self.tokenizer.code_vectors()[samples]
                    rollout.advantages = objective.residual_advantages(rewards.total, rollout.gradients, vectors)
            else:
                rewards = pixel_rewards(*scored, local=settings.credit != "image", energy=energy)
                rollout.advantages = self._advantages(rewards)
        if settings.compat.rollout_in_eval:
            rollout.old_log_probs = objective.token_log_probs(logits, samples)
        if settings.has_start:
            with self.stages("transformer"):
                reference_logits = self.start_logits(context, condition)
                if settings.prior == "kl":
                    rollout.reference_log_probs = objective.token_log_probs(reference_logits, samples)
                else:  # where an image's condition was dropped both passes are one, and so is their mixture
                    null_logits = self.start_logits(context, self.null(condition))
                    rollout.guided_logits = objective.guide(reference_logits, null_logits, settings.prior_guidance)
        metrics = {"reward_mean": rewards.total.mean()}
        if settings.group_size > 1:
            metrics["reward_std"] = rewards.total.std(dim=1).mean()
        if rollout.advantages is not None:
            metrics["equal_groups"] = (rollout.advantages == 0).flatten(1).all(dim=1).float().mean()
        return rollout, metrics | {name: part.mean() for name, part in rewards.parts.items()}

    def score(self, logits: Tensor, rollout: Rollout) -> Outcome:
        """The reward's term and the prior (Eq. 11) of a rollout; `logits` (B,N,V) carry the gradient."""
        settings = self.settings
        with self.stages("loss"):
            tokens = rollout.targets[:, None]
            if rollout.advantages is not None:  # samples and targets at once, so that the logits get a single gradient
                tokens = torch.cat([rollout.samples, tokens], dim=1)
            log_probs = objective.token_log_probs(logits, tokens)
            log_probs, true_log_probs = log_probs[:, :-1], log_probs[:, -1]
            loss, metrics = torch.zeros((), device=logits.device), {}
            if rollout.advantages is not None:
                if rollout.old_log_probs is None:
                    rollout.old_log_probs = log_probs.detach()  # of this very pass, so that the first ratio is 1
                loss, metrics = objective.policy_loss(
                    log_probs, rollout.old_log_probs, rollout.advantages, clip_range=settings.clip_range
                )
                metrics = {"policy_loss": loss.detach(), **metrics}
            if rollout.gradients is not None:
                linear = objective.first_order_loss(logits, self.tokenizer.code_vectors(), rollout.gradients)
                # The policy's term is a mean over the tokens; beside it this one must be, too.
                loss = loss + linear / logits.shape[1] if settings.estimator == "both" else linear
                metrics["first_order_loss"] = linear.detach()
            cross_entropy = -true_log_probs.mean()
            metrics["cross_entropy"] = cross_entropy.detach()
            if settings.prior_weight > 0:
                prior = cross_entropy
                if settings.prior == "kl":
                    assert rollout.reference_log_probs is not None
                    prior = objective.kl_prior(log_probs, rollout.reference_log_probs)
                elif settings.prior == "guided":
                    assert rollout.guided_logits is not None
                    prior = objective.guided_prior(logits, rollout.guided_logits)
                loss = loss + settings.prior_weight * prior
                metrics["prior_loss"] = prior.detach()
        return Outcome(loss, metrics, rollout)

    def _teach(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Any]:
        """Targets x*, noisy context x̃* (Eq. 28) and the condition, dropped for some images."""
        targets = context = self.encode(batch)
        condition = self.model.drop_condition(batch.condition, self.drop(batch, step))
        if (rate := self._context_noise(step)) > 0:
            draws = self.uniforms(batch, step, (targets.shape[1], 2), Stream.CONTEXT_NOISE)
            context = self._noisy(targets, condition, draws, rate)
        return targets, context, condition

    def _noisy(self, targets: Tensor, condition: Any, draws: Tensor, rate: float) -> Tensor:
        """Targets with context noise, by uniform numbers (B,N,2): whether a token is replaced, and by what."""
        if self.settings.context_noise_source == "model":
            logits = self._logits_in_eval(targets, condition)
            own = objective.sample_tokens(logits, 1, uniforms=draws[:, None, :, 1])[:, 0]
            return torch.where(draws[..., 0] < rate, own, targets)
        return objective.corrupt(
            targets,
            rate,
            self.model.vocab_size,
            uniforms=draws,
            exclude_true=not self.settings.compat.uniform_noise,
        )

    def _context_noise(self, number: int) -> float:
        """ξ of a batch, numbered from 0."""
        first, last = self.settings.context_noise, self.settings.context_noise_end
        return first if last is None else first + (last - first) * number / max(1, self.batches - 1)

    def _pass(self, context: Tensor, condition: Any) -> Tensor:
        """The one pass that carries the gradient."""
        with self.stages("transformer"):
            self.model.train(self.settings.policy_mode == "train")
            return self.logits(self.model, context, condition)

    def _logits_in_eval(self, context: Tensor, condition: Any) -> Tensor:
        with self.stages("transformer"), torch.no_grad():
            self.model.eval()
            logits = self.logits(self.model, context, condition)
            self.model.train()
        return logits

    def _sample(self, logits: Tensor, batch: Batch, step: int) -> Tensor:
        with self.stages("sample"):
            shape = (self.settings.group_size, logits.shape[1])
            uniforms = self.uniforms(batch, step, shape, Stream.SAMPLES)
            return objective.sample_tokens(logits, self.settings.group_size, uniforms=uniforms)

    def _advantages(self, rewards: objective.Rewards) -> Tensor:
        """(B,G), or (B,G,N) where the credit is not by image."""
        clip = self.settings.advantage_clip
        how: Any = {"clip": clip, "baseline": self.settings.baseline, "scale_by_std": self.settings.scale_by_std}
        by_image = objective.group_advantages(rewards.total, **how)
        if rewards.maps is None:
            return by_image
        by_token = objective.local_advantages(rewards.maps, **how)
        return by_token if self.settings.credit == "local" else (by_token + by_image.unsqueeze(-1)) / 2


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> VaPi:
    settings = recipe.method
    assert isinstance(settings, Settings)
    method = VaPi(
        **parts(recipe, num_classes, device, reference=settings.has_start),
        perceptual=load_reward_network(settings.reward, device),
        batches=recipe.training.steps // recipe.training.updates_per_batch,
    )
    if settings.estimator != "policy":
        method.tokenizer.code_vectors()  # refused now where there are none
    return method
