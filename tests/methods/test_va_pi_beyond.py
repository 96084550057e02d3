"""VA-π beyond the paper: local credit, the first-order estimator, the guided prior."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from varpi import objective
from varpi.data import Batches
from varpi.data.opening import open_split
from varpi.errors import VarpiError
from varpi.methods import build_method
from varpi.methods.va_pi import VaPi
from varpi.recipe import Recipe
from varpi.runtime.processes import World
from varpi.runtime.randomness import Stream
from varpi.tokenizers import VQ
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress
from varpi.weights import load_generator

BEYOND = {
    "local": ("method.credit=local",),
    "mixed": ("method.credit=mixed",),
    "first_order": ("method.estimator=first_order", "method.group_size=2"),
    "one_sample": ("method.estimator=first_order", "method.group_size=1"),
    "guided": ("method.prior=guided", "method.prior_weight=0.5"),
    "both": ("method.estimator=both", "method.group_size=3"),
    "unscaled": ("method.baseline=leave_one_out", "method.scale_by_std=false"),
    "own_noise": ("method.context_noise_source=model", "method.context_noise=0.5"),
    "falling_noise": ("method.context_noise=0.5", "method.context_noise_end=0"),
    "first_order_guided": ("method.estimator=first_order", "method.group_size=2", "method.prior=guided"),
}


def build(recipe: Recipe) -> VaPi:
    method = build_method(recipe, 3, "cpu")
    assert isinstance(method, VaPi)
    return method


def batches(recipe: Recipe) -> Batches:
    data = open_split(recipe.data, recipe.data.split)
    return Batches(data, batch_size=recipe.training.batch_size, seed=recipe.seed)


def updates(recipe: Recipe, numbers: Iterator[int] | range) -> Iterator[tuple[VaPi, dict[str, float]]]:
    """The method and its metrics, update by update, on the batches of these numbers."""
    method = build(recipe)
    trainer = Trainer(recipe, method, make_optimizer(method.model, recipe.optimizer), World(0, 1, "cpu"))
    progress = Progress()
    for step, number in enumerate(numbers):
        (metrics,) = trainer.updates(batches(recipe).at(number), step, progress)
        yield method, metrics


@pytest.mark.parametrize("name", ["local", "first_order", "guided", "both"])
def test_the_reward_rises(pair: Path, name: str) -> None:
    recipe = tiny.recipe(
        pair,
        "method.group_size=16",
        "method.context_noise=0",
        "method.condition_drop=0",
        "method.policy_mode=eval",
        "optimizer.learning_rate=1e-3",
        *BEYOND[name],
        f"method.prior_weight={1e-4 if name == 'guided' else 0}",
    )
    numbers = (number % 2 for number in range(40))
    rewards = [metrics["reward_mean"] for _, metrics in updates(recipe, numbers)]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.003


@pytest.mark.parametrize("settings", BEYOND.values(), ids=BEYOND)
def test_micro_batches_change_nothing(pair: Path, settings: tuple[str, ...]) -> None:
    recipe = tiny.recipe(pair, "method.policy_mode=eval", "method.condition_drop=0.3", *settings)
    results = []
    for size in (8, 3):
        changed = recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch": size})})
        results += [(metrics, dict(method.model.named_parameters())) for method, metrics in updates(changed, range(1))]
    (whole, weights), (split, others) = results
    for name in ("loss", "reward_mean", "cross_entropy", "prior_loss", "gradient_norm"):
        assert split[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
    assert all(torch.isfinite(weight).all() for weight in (*weights.values(), *others.values()))


def test_credit_by_token(pair: Path) -> None:
    rollouts: list[Any] = []
    for credit in ("image", "local", "mixed"):
        recipe = tiny.recipe(pair, "method.policy_mode=eval", "method.condition_drop=0", f"method.credit={credit}")
        rollouts.append(build(recipe).loss(batches(recipe).at(0), 0).rollout)
    by_image, by_token, both = (rollout.advantages for rollout in rollouts)
    assert all(torch.equal(rollout.samples, rollouts[0].samples) for rollout in rollouts)
    assert by_token.shape == rollouts[1].samples.shape
    torch.testing.assert_close(both, (by_token + by_image.unsqueeze(-1)) / 2)
    torch.testing.assert_close(by_token.mean(dim=1), torch.zeros_like(by_token[:, 0]), atol=1e-5, rtol=0)
    assert by_token.std(dim=2).mean() > 0.1  # tokens of one sample differ


def test_first_order_needs_no_ratio_and_the_loss_is_the_expected_error(pair: Path) -> None:
    recipe = tiny.recipe(pair, "method.estimator=first_order", "method.policy_mode=eval", "method.prior_weight=0")
    method, batch = build(recipe), batches(recipe).at(0)
    outcome = method.loss(batch, 0)
    assert "ratio_mean" not in outcome.metrics
    rollout: Any = outcome.rollout
    assert rollout.advantages is None
    tokenizer: Any = method.tokenizer
    assert rollout.gradients.shape == (*rollout.samples.shape, tokenizer.code_vectors().shape[1])
    logits = method.model.logits(rollout.context, rollout.condition)
    expected = (logits.softmax(-1) @ tokenizer.code_vectors() * rollout.gradients.mean(1)).sum((1, 2)).mean()
    torch.testing.assert_close(outcome.loss, expected)
    plain = objective.score_samples(
        tokenizer.decode, rollout.samples, batch.images, objective.RewardWeights(1.0, 0.0), chunk=8
    )
    torch.testing.assert_close(outcome.metrics["reward_mean"], plain.total.mean())


def test_both_estimators_together(pair: Path) -> None:
    """The policy term of what the linear values leave over, and those values' expectation, each a mean over tokens."""
    recipe = tiny.recipe(pair, "method.estimator=both", "method.policy_mode=eval", "method.prior_weight=0")
    method, batch = build(recipe), batches(recipe).at(0)
    outcome = method.loss(batch, 0)
    assert outcome.metrics["ratio_mean"] == 1
    rollout: Any = outcome.rollout
    tokenizer: Any = method.tokenizer
    vectors = tokenizer.code_vectors()
    plain = objective.score_samples(
        tokenizer.decode, rollout.samples, batch.images, objective.RewardWeights(1.0, 0.0), chunk=8
    )
    torch.testing.assert_close(
        rollout.advantages, objective.residual_advantages(plain.total, rollout.gradients, vectors[rollout.samples])
    )
    logits = method.model.logits(rollout.context, rollout.condition)
    chosen = logits.log_softmax(-1)[:, None].expand(-1, 4, -1, -1).gather(-1, rollout.samples[..., None])[..., 0]
    policy = -(rollout.advantages[..., None] * (chosen - chosen.detach()).exp()).mean()
    linear = (logits.softmax(-1) @ vectors * rollout.gradients.mean(1)).sum((1, 2)).mean() / 16
    torch.testing.assert_close(outcome.loss, policy + linear)
    parameters = list(method.model.parameters())
    found, expected = (torch.autograd.grad(loss, parameters) for loss in (outcome.loss, policy + linear))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-3)


def test_baselines_reach_the_advantages(pair: Path) -> None:
    settings = ("method.baseline=leave_one_out", "method.scale_by_std=false", "method.policy_mode=eval")
    recipe = tiny.recipe(pair, *settings)
    method, batch = build(recipe), batches(recipe).at(0)
    rollout: Any = method.loss(batch, 0).rollout
    rewards = objective.score_samples(
        method.tokenizer.decode, rollout.samples, batch.images, objective.RewardWeights(1.0, 0.0)
    ).total
    others = (rewards.sum(1, keepdim=True) - rewards) / 3
    torch.testing.assert_close(rollout.advantages, rewards - others, atol=1e-6, rtol=1e-4)


def test_noise_of_the_models_own(pair: Path) -> None:
    """Replaced tokens are draws from its prediction under the true context, without dropout."""
    settings = ("method.context_noise_source=model", "generator.dropout=0.5", "method.condition_drop=0")
    recipe = tiny.recipe(pair, *settings, "method.context_noise=0.5")
    method, batch = build(recipe), batches(recipe).at(0)
    rollout: Any = method.loss(batch, 0).rollout
    draws = method.uniforms(batch, 0, (16, 2), Stream.CONTEXT_NOISE)
    with torch.no_grad():
        logits = load_generator(pair / "generator.safetensors").logits(rollout.targets, rollout.condition)
    own = objective.sample_tokens(logits, 1, uniforms=draws[:, None, :, 1])[:, 0]
    assert torch.equal(rollout.context, torch.where(draws[..., 0] < 0.5, own, rollout.targets))
    assert not torch.equal(rollout.context, rollout.targets)


def test_noise_that_rises(pair: Path) -> None:
    """From 0 to 1 over five batches, whatever the updates of each: by a quarter a batch."""
    settings = ("method.context_noise=0", "method.context_noise_end=1", "method.condition_drop=0")
    recipe = tiny.recipe(pair, *settings, "training.steps=10", "training.updates_per_batch=2")
    method, batch = build(recipe), batches(recipe).at(0)
    for number in range(5):
        rollout: Any = method.loss(batch, number).rollout
        replaced = method.uniforms(batch, number, (16, 2), Stream.CONTEXT_NOISE)[..., 0] < number / 4
        assert torch.equal(rollout.context != rollout.targets, replaced)
    assert method.loss(batch, 0).rollout.context.equal(method.encode(batch))


def test_a_guided_prior_of_scale_one_holds_still(pair: Path) -> None:
    """The start model is its own target at scale 1."""
    recipe = tiny.recipe(
        pair, "method.prior=guided", "method.prior_guidance=1", "method.prior_weight=1", "method.policy_mode=eval"
    )
    method = build(recipe)
    rollout: Any = method.loss(batches(recipe).at(0), 0).rollout
    logits = method.model.logits(rollout.context, rollout.condition).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.guided_prior(logits, rollout.guided_logits), logits)
    assert gradient.abs().max() < 1e-7


def test_a_guided_prior_is_the_frozen_starts_own_guidance(pair: Path) -> None:
    recipe = tiny.recipe(
        pair, "method.prior=guided", "method.prior_guidance=3", "method.condition_drop=0.5", "generator.dropout=0.5"
    )
    method, batch = build(recipe), batches(recipe).at(0)
    reference: Any = method.reference
    assert not any(p.requires_grad for p in reference.parameters())
    with torch.no_grad():
        for p in method.model.parameters():
            p.add_(0.1)  # the trained model is elsewhere by now; its target is not
    rollout: Any = method.loss(batch, 0).rollout
    dropped = rollout.condition == method.model.num_classes
    assert dropped.any()
    assert not dropped.all()

    def logits(condition: Tensor) -> Tensor:
        with torch.no_grad():
            return reference.eval().logits(rollout.context, condition)

    null = logits(torch.full_like(rollout.condition, method.model.num_classes))
    expected = null + 3 * (logits(batch.condition) - null)
    expected[dropped] = null[dropped]  # an image without its condition learns the null model, not a guided one
    torch.testing.assert_close(rollout.guided_logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prior", ["guided", "kl"])
def test_with_adapters_the_start_is_the_model_without_them(
    pair: Path, monkeypatch: pytest.MonkeyPatch, prior: str
) -> None:
    """No second generator is opened, and loss and gradient are those that a second one gives."""
    recipe = tiny.recipe(pair, f"method.prior={prior}", "lora.rank=2", "generator.dropout=0.5")
    with monkeypatch.context() as patch:
        patch.setattr("varpi.methods.teacher_forcing.open_generator", lambda *_: pytest.fail("a second generator"))
        method = build(recipe)
    assert (method.reference, method.frozen) == (None, ())
    draws = torch.Generator().manual_seed(0)
    trained = {name: p for name, p in method.model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data += 0.1 * torch.randn(p.shape, generator=draws)
    results = []
    for reference in (None, load_generator(pair / "generator.safetensors")):
        method.reference = reference
        torch.manual_seed(0)  # of dropout
        outcome = method.loss(batches(recipe).at(0), 0)
        results.append((outcome.metrics, torch.autograd.grad(outcome.loss, list(trained.values()))))
    (own, gradients), (second, expected) = results
    assert own["prior_loss"] > 0
    assert all(torch.equal(own[name], second[name]) for name in own)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert sum(g.abs().sum() for g in gradients) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("method.group_size=1",), "group_size is 1; the policy estimator compares at least 2 samples"),
        (("method.estimator=first_order", "method.credit=local"), "credit is local, but the first_order estimator"),
        (("method.estimator=first_order", "method.prior=kl"), "prior is kl, which is estimated on the policy's"),
        (("method.estimator=both", "method.group_size=1"), "group_size is 1; the both estimator compares at least 2"),
        (("method.estimator=both", "method.credit=local"), "credit is local, but the estimator both has advantages by"),
        (("method.estimator=both", "method.compat.rollout_in_eval=true"), "rollout_in_eval makes ratios that are not"),
        (("method.estimator=both", "method.scale_by_std=false"), "scale_by_std is False, which is for estimator"),
        (("method.estimator=first_order", "method.baseline=leave_one_out"), "baseline is leave_one_out, which is for"),
        (
            ("method.estimator=first_order", "method.clip_range=0.1"),
            "clip_range is 0.1, which is for ratios; estimator",
        ),
        (("method.context_noise_source=model", "method.context_noise=0"), "context_noise_source is model but context_"),
        (("method.prior_guidance=2",), "prior_guidance is set but prior is cross_entropy"),
        (("method.prior=guided", "method.prior_guidance=0.5"), "method.prior_guidance is 0.5; it must be greater"),
    ],
)
def test_contradictions_are_refused(pair: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        tiny.recipe(pair, *settings)


@pytest.mark.parametrize("estimator", ["policy", "first_order"])
def test_bf16_rewards_rank_samples_as_fp32_ones_do(pair: Path, estimator: str) -> None:
    """Correlation of advantages (of gradients at the codes) above 0.99, and another precision it is."""
    found = []
    for precision in ("fp32", "bf16"):
        method = build(tiny.recipe(pair, f"method.estimator={estimator}", f"method.reward.precision={precision}"))
        recipe = tiny.recipe(pair)
        outcome = method.loss(batches(recipe).at(0), 0)
        assert isinstance(method.tokenizer, VQ)
        assert method.tokenizer.decoder.conv_out.weight.dtype == (torch.bfloat16 if found else torch.float32)
        rollout = outcome.rollout
        scores = rollout.gradients if estimator == "first_order" else rollout.advantages
        assert scores.dtype == torch.float32
        found.append(scores.flatten())
    assert not torch.equal(*found)
    assert torch.corrcoef(torch.stack(found))[0, 1] > 0.99
