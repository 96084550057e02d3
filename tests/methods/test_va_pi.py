"""VA-π's step: the original implementation's numbers, one shared pass against G repeated ones, the source of draws.

B images, G samples per image, N tokens per image.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from golden import config_of, golden, original_state
from torch import Tensor

from varpi import objective
from varpi.data import Batch, Batches, open_dataset
from varpi.generators import LlamaGen
from varpi.methods import build_method
from varpi.methods.rewards import Reward
from varpi.methods.va_pi import Rollout, Settings, VaPi
from varpi.recipe import Recipe
from varpi.runtime.processes import World
from varpi.runtime.randomness import Stream, uniforms
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress
from varpi.weights import load_generator

NO_PERCEPTUAL = Reward(perceptual_weight=0)


def build(recipe: Recipe) -> VaPi:
    dataset = open_dataset(recipe.data.source, image_size=recipe.data.image_size)
    method = build_method(recipe, dataset.num_classes, "cpu")
    assert isinstance(method, VaPi)
    return method


def batches(recipe: Recipe, rank: int = 0, world_size: int = 1) -> Batches:
    dataset = open_dataset(recipe.data.source, image_size=recipe.data.image_size)
    return Batches(dataset, batch_size=recipe.training.batch_size, seed=recipe.seed, rank=rank, world_size=world_size)


def gradients(method: VaPi) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in method.model.named_parameters() if p.grad is not None}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative distance (in norm) between two sets of tensors of the same names."""
    assert one.keys() == other.keys()
    assert all(other[name].norm() > 0 for name in other)
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


# -- the original implementation's numbers


@dataclasses.dataclass
class Original:
    values: dict[str, Tensor]
    method: VaPi
    batch: Batch


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Original:
    """The method on the fixture's generator, with the fixture's noise, samples and rewards in place of drawn ones.

    Indirect parameter: the prior.
    """
    values, metadata = golden("llamagen_c2i_small")
    config = config_of(metadata)

    def load(salt: str) -> LlamaGen:
        generator = load_generator(original_state(LlamaGen(config), salt), architecture=config)
        assert isinstance(generator, LlamaGen)
        return generator

    prior = request.param
    settings = Settings(
        name="va_pi",
        context_noise=0.5,
        prior=prior,
        policy_mode="eval",
        condition_drop=0,
        reward=NO_PERCEPTUAL,
    )
    monkeypatch.setattr(objective, "corrupt", lambda *_, **__: values["noisy"])
    monkeypatch.setattr(objective, "sample_tokens", lambda *_, **__: values["samples"])
    monkeypatch.setattr(objective, "score_samples", lambda *_, **__: objective.Rewards(values["rewards"], {}))
    tokenizer: Any = SimpleNamespace(encode=lambda _: values["tokens"], decode=None)
    reference = load(metadata["salt"] + "base") if prior == "kl" else None
    method = VaPi(load(metadata["salt"]), tokenizer, settings, reference=reference)
    count = len(values["tokens"])
    batch = Batch(torch.zeros(count, 3, 8, 8), values["classes"], torch.arange(count), torch.arange(count), 0)
    return Original(values, method, batch)


def original_gradient(method: VaPi, name: str) -> Tensor:
    ours = {
        "cls_embedding.embedding_table.weight": "class_embedding.weight",
        "layers.0.attention.wqkv.weight": "blocks.0.attention.qkv.weight",
        "layers.2.feed_forward.w1.weight": "blocks.2.feed_forward.gate.weight",
        "output.weight": "output.weight",
        "tok_embeddings.weight": "token_embedding.weight",
    }
    gradient = method.model.get_parameter(ours[name]).grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("original", ["cross_entropy"], indirect=True)
def test_original_step(original: Original) -> None:
    values, method = original.values, original.method
    first = method.loss(original.batch, 0)
    assert isinstance(first.rollout, Rollout)
    torch.testing.assert_close(first.rollout.advantages, values["advantages"], atol=1e-5, rtol=0)
    assert torch.equal(first.rollout.context, values["noisy"])
    assert torch.equal(first.rollout.targets, values["tokens"])
    assert first.metrics["ratio_mean"] == 1

    rollout = dataclasses.replace(first.rollout, old_log_probs=values["old_logprobs"])
    second = method.loss(original.batch, 0, rollout)
    torch.testing.assert_close(second.metrics["policy_loss"], values["policy_loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(second.metrics["prior_loss"], values["prior_ce"], atol=1e-5, rtol=0)
    torch.testing.assert_close(second.loss, values["policy_loss"] + 0.1 * values["prior_ce"], atol=1e-5, rtol=0)
    second.loss.backward()
    names = [key.removeprefix("grad_vapi.") for key in values if key.startswith("grad_vapi.")]
    assert len(names) == 4
    for name in names:
        expected = values[f"grad_vapi.{name}"]
        assert (original_gradient(method, name) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("original", ["kl"], indirect=True)
def test_original_kl_prior(original: Original) -> None:
    values, method = original.values, original.method
    first = method.loss(original.batch, 0)
    torch.testing.assert_close(first.metrics["prior_loss"], values["kl_k3"], atol=1e-5, rtol=1e-5)
    assert isinstance(first.rollout, Rollout)
    rollout = dataclasses.replace(first.rollout, old_log_probs=values["old_logprobs"])
    second = method.loss(original.batch, 0, rollout)
    torch.testing.assert_close(second.loss, values["policy_loss"] + 0.1 * values["kl_k3"], atol=1e-5, rtol=0)
    second.loss.backward()
    for name in ("layers.2.feed_forward.w1.weight", "output.weight"):
        norm = original_gradient(method, name).norm()
        torch.testing.assert_close(norm, values[f"gradnorm_vapi_kl.{name}"], atol=0, rtol=1e-4)
    assert method.reference is not None
    assert all(p.grad is None for p in method.reference.parameters())


# -- one pass against G


def repeated_passes(method: VaPi, rollout: Rollout) -> Tensor:
    """The released code's way to the same loss: every sample with its own copy of the context, plainly written."""
    samples = rollout.samples.flatten(0, 1)
    copies = rollout.samples.shape[1]
    context, condition, targets = (
        t.repeat_interleave(copies, 0) for t in (rollout.context, rollout.condition, rollout.targets)
    )
    logits = method.model.logits(context, condition)
    log_probs = logits.log_softmax(-1).gather(-1, samples[..., None])[..., 0]
    ratio = (log_probs - rollout.old_log_probs.flatten(0, 1)).exp()
    advantages = rollout.advantages.flatten()[:, None]
    clipped = ratio.clamp(1 - method.settings.clip_range, 1 + method.settings.clip_range)
    policy = -torch.minimum(advantages * ratio, advantages * clipped).mean()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return policy + method.settings.prior_weight * cross_entropy


def test_one_shared_pass_equals_repeated_passes(pair: Path) -> None:
    recipe = tiny.recipe(pair, "method.policy_mode=eval", "method.group_size=8")
    method = build(recipe)
    batch = batches(recipe).at(0)
    rollout = method.loss(batch, 0).rollout
    old = rollout.old_log_probs + 0.2 * torch.randn(rollout.old_log_probs.shape)  # so that the clip has work
    rollout = dataclasses.replace(rollout, old_log_probs=old)
    outcome = method.loss(batch, 0, rollout)
    assert 0.1 < outcome.metrics["clip_fraction"] < 0.9
    outcome.loss.backward()
    shared_gradients = gradients(method)
    method.model.zero_grad()
    repeated = repeated_passes(method, rollout)
    repeated.backward()
    torch.testing.assert_close(outcome.loss, repeated, atol=0, rtol=1e-5)
    assert distance(shared_gradients, gradients(method)) < 1e-5


# -- the ratio


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_first_ratio_is_exactly_one(pair: Path, mode: str) -> None:
    recipe = tiny.recipe(pair, f"method.policy_mode={mode}")
    outcome = build(recipe).loss(batches(recipe).at(0), 0)
    assert outcome.metrics["ratio_mean"].item() == 1.0
    assert outcome.metrics["clip_fraction"].item() == 0.0
    assert outcome.metrics["approx_kl"].item() == 0.0
    assert outcome.metrics["reward_std"] > 0


def test_compat_rollout_in_eval_compares_two_networks(pair: Path) -> None:
    """As the released launchers run: sampled without dropout, differentiated with it."""
    recipe = tiny.recipe(pair, "method.compat.rollout_in_eval=true")
    method = build(recipe)
    batch = batches(recipe).at(0)
    outcome = method.loss(batch, 0)
    assert abs(outcome.metrics["ratio_mean"].item() - 1) > 1e-4
    assert outcome.metrics["approx_kl"] > 1e-4
    assert method.model.training
    rollout = outcome.rollout
    method.model.eval()
    with torch.no_grad():
        logits = method.model.logits(rollout.context, rollout.condition)
    expected = logits.log_softmax(-1)[:, None].expand(-1, 4, -1, -1).gather(-1, rollout.samples[..., None])[..., 0]
    torch.testing.assert_close(rollout.old_log_probs, expected, atol=1e-5, rtol=0)


def test_compat_rollout_in_eval_is_the_plain_way_without_dropout(pair: Path) -> None:
    plain, compat = (
        tiny.recipe(pair, "generator.dropout=0", *more) for more in ((), ("method.compat.rollout_in_eval=true",))
    )
    batch = batches(plain).at(0)
    one, other = build(plain).loss(batch, 0), build(compat).loss(batch, 0)
    assert torch.equal(one.rollout.samples, other.rollout.samples)
    torch.testing.assert_close(one.loss, other.loss, atol=1e-6, rtol=1e-5)


def test_later_updates_keep_the_first_log_probabilities(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(pair, "training.updates_per_batch=3", "training.micro_batch=4", "generator.dropout=0")
    method = build(recipe)
    rollouts = []
    original = method.loss

    def spy(batch: Batch, step: int, rollout: Rollout | None = None) -> Any:
        outcome = original(batch, step, rollout)
        rollouts.append(outcome.rollout)
        return outcome

    monkeypatch.setattr(method, "loss", spy)
    encodes = []
    encode = method.tokenizer.encode
    monkeypatch.setattr(method.tokenizer, "encode", lambda images: (encodes.append(1), encode(images))[1])
    trainer = Trainer(recipe, method, make_optimizer(method.model, recipe.optimizer), World(0, 1, "cpu"))
    first, second, third = trainer.updates(batches(recipe).at(0), 0, Progress())
    assert len(encodes) == 2  # once for each micro-batch
    assert rollouts[0] is rollouts[2] is rollouts[4]
    assert rollouts[1] is rollouts[3] is rollouts[5]
    assert first["ratio_mean"] == 1.0
    assert second["ratio_mean"] != 1.0
    assert min(second["approx_kl"], third["approx_kl"]) > 1e-3
    assert "reward_mean" in first
    assert "reward_mean" not in second


# -- settings and modes that must arrive


def test_the_clips_of_the_recipe_are_the_clips_of_the_loss(pair: Path) -> None:
    recipe = tiny.recipe(
        pair, "method.policy_mode=eval", "method.advantage_clip=0.25", "method.clip_range=0.05", "method.prior_weight=0"
    )
    method = build(recipe)
    batch = batches(recipe).at(0)
    rollout = method.loss(batch, 0).rollout
    rewards = objective.score_samples(
        method.tokenizer.decode, rollout.samples, batch.images, objective.RewardWeights(perceptual=0)
    )
    free = objective.group_advantages(rewards.total, clip=100)
    assert free.abs().max() > 1
    torch.testing.assert_close(rollout.advantages, free.clamp(-0.25, 0.25), atol=1e-4, rtol=0)

    old = rollout.old_log_probs + 0.1 * torch.randn(rollout.old_log_probs.shape)
    outcome = method.loss(batch, 0, dataclasses.replace(rollout, old_log_probs=old))
    ratio = (rollout.old_log_probs - old).exp()
    advantages = rollout.advantages[..., None]
    expected = -torch.minimum(advantages * ratio, advantages * ratio.clamp(0.95, 1.05)).mean()
    torch.testing.assert_close(outcome.loss, expected, atol=1e-7, rtol=1e-4)
    assert outcome.metrics["clip_fraction"].item() == pytest.approx(((ratio - 1).abs() > 0.05).float().mean().item())
    assert 0.2 < outcome.metrics["clip_fraction"] < 0.8


def test_the_reference_has_no_dropout(pair: Path) -> None:
    """Its log-probabilities are those of eval mode, also when the policy trains with dropout."""
    recipe = tiny.recipe(pair, "method.prior=kl", "method.policy_mode=train", "generator.dropout=0.5")
    method = build(recipe)
    assert method.reference is not None
    rollout = method.loss(batches(recipe).at(0), 0).rollout
    with torch.no_grad():
        logits = load_generator(pair / "generator.safetensors").eval().logits(rollout.context, rollout.condition)
    expected = objective.token_log_probs(logits, rollout.samples)
    torch.testing.assert_close(rollout.reference_log_probs, expected, atol=1e-5, rtol=0)


def test_validation_has_no_dropout_and_no_noise(pair: Path) -> None:
    """After a step in train mode, too."""
    recipe = tiny.recipe(pair, "generator.dropout=0.5", "method.context_noise=0.5", "method.condition_drop=0.5")
    method = build(recipe)
    batch = batches(recipe).at(0)
    method.loss(batch, 0)
    assert method.model.training
    with torch.no_grad():
        loss = method.validation_loss(batch)
        targets = method.tokenizer.encode(batch.images)
        logits = load_generator(pair / "generator.safetensors").eval().logits(targets, batch.condition)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


# -- what a weight of 0 leaves out


def test_weight_zero_loads_nothing(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("must not be loaded")

    monkeypatch.setattr("varpi.methods.rewards.load_perceptual", refuse)
    monkeypatch.setattr("varpi.methods.teacher_forcing.open_generator", refuse)
    for settings in (
        ("method.prior_weight=0", "method.prior=kl"),
        ("method.prior_weight=0",),
        ("method.prior_weight=0.1",),
    ):
        method = build(tiny.recipe(pair, *settings))
        assert method.perceptual is None
        assert method.reference is None
        assert method.frozen == ()


def test_weights_decide_what_is_computed(pair: Path) -> None:
    recipe = tiny.recipe(pair, "method.reward.mse_weight=0", "method.reward.l1_weight=2", "method.prior_weight=0")
    metrics = build(recipe).loss(batches(recipe).at(0), 0).metrics
    assert "mse" not in metrics
    assert "perceptual" not in metrics
    assert "prior_loss" not in metrics
    torch.testing.assert_close(metrics["reward_mean"], -2 * metrics["l1"])


def test_kl_prior_has_a_frozen_copy(pair: Path) -> None:
    recipe = tiny.recipe(pair, "method.prior=kl", "generator.dropout=0")
    method = build(recipe)
    assert method.reference is not None
    assert method.frozen == (method.reference,)
    assert not any(p.requires_grad for p in method.reference.parameters())
    outcome = method.loss(batches(recipe).at(0), 0)
    assert outcome.metrics["prior_loss"].item() == 0.0  # the two are still the same network
    trainer = Trainer(recipe, method, make_optimizer(method.model, recipe.optimizer), World(0, 1, "cpu"))
    before = [p.clone() for p in method.reference.parameters()]
    first, second = (next(trainer.updates(batches(recipe).at(n), n, Progress(step=n))) for n in range(2))
    assert first["prior_loss"] == 0.0
    assert second["prior_loss"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, method.reference.parameters(), strict=True))


# -- what trains


def test_the_generator_moves_and_the_tokenizer_does_not(pair: Path) -> None:
    recipe = tiny.recipe(pair, "method.condition_drop=0.5")
    method = build(recipe)
    trainer = Trainer(recipe, method, make_optimizer(method.model, recipe.optimizer), World(0, 1, "cpu"))
    generator = {name: p.detach().clone() for name, p in method.model.named_parameters()}
    tokenizer: Any = method.tokenizer
    codes = {name: t.clone() for name, t in tokenizer.state_dict().items()}
    progress = Progress()
    for number in range(3):
        (metrics,) = trainer.updates(batches(recipe).at(number), number, progress)
        assert metrics["ratio_mean"] == 1.0
    assert all(not torch.equal(p, generator[name]) for name, p in method.model.named_parameters())
    assert all(torch.equal(t, codes[name]) for name, t in tokenizer.state_dict().items())
    assert progress == Progress(step=3)


def test_the_reward_rises(pair: Path) -> None:
    """On two batches again and again, the samples come to decode nearer to their images."""
    recipe = tiny.recipe(
        pair,
        "method.group_size=16",
        "method.prior_weight=0",
        "method.context_noise=0",
        "method.policy_mode=eval",
        "optimizer.learning_rate=1e-3",
    )
    method = build(recipe)
    trainer = Trainer(recipe, method, make_optimizer(method.model, recipe.optimizer), World(0, 1, "cpu"))
    seen = [batches(recipe).at(number) for number in range(2)]
    progress = Progress()
    rewards = [next(trainer.updates(seen[number % 2], number, progress))["reward_mean"] for number in range(40)]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.01


# -- draws


def split_runs(recipe: Recipe, sizes: tuple[int, ...]) -> Iterator[tuple[dict[str, float], dict[str, Tensor]]]:
    """Metrics and (unclipped) gradients of one update, for several micro-batch sizes."""
    for size in sizes:
        changed = recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch": size})})
        method = build(changed)
        trainer = Trainer(changed, method, make_optimizer(method.model, recipe.optimizer), World(0, 1, "cpu"))
        (metrics,) = trainer.updates(batches(recipe).at(0), 0, Progress())
        yield metrics, gradients(method)


def test_micro_batches_change_nothing(pair: Path) -> None:
    recipe = tiny.recipe(pair, "method.policy_mode=eval", "optimizer.gradient_clip=1e9", "method.condition_drop=0.3")
    (whole, whole_gradients), *others = split_runs(recipe, (8, 1, 3))
    for metrics, split_gradients in others:
        for name in ("loss", "reward_mean", "reward_std", "policy_loss", "prior_loss", "cross_entropy", "entropy"):
            assert metrics[name] == pytest.approx(whole[name], rel=1e-6, abs=1e-6)
        assert metrics["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-5)
        assert distance(split_gradients, whole_gradients) < 1e-5


def test_draws_belong_to_the_image(pair: Path) -> None:
    """Neither the micro-batch split nor the number of processes moves a draw from one image to another."""
    recipe = tiny.recipe(pair, "method.policy_mode=eval", "method.condition_drop=0.5", "method.context_noise=0.5")
    method = build(recipe)
    batch = batches(recipe).at(3)
    whole = method.loss(batch, 3).rollout
    assert 0 < (whole.condition == tiny.GENERATOR.num_classes).sum() < 8  # some are dropped, and not all
    assert 0.3 < (whole.context != whole.targets).float().mean() < 0.7
    fields = ("images", "condition", "positions", "indices")
    micro = [
        dataclasses.replace(batch, **{name: getattr(batch, name)[rows] for name in fields})
        for rows in (slice(0, 3), slice(3, 6), slice(6, 8))
    ]
    for parts in (micro, [batches(recipe, rank, 2).at(3) for rank in (0, 1)]):
        rollouts = [method.loss(part, 3).rollout for part in parts]
        for name in ("targets", "context", "condition", "samples"):
            assert torch.equal(torch.cat([getattr(r, name) for r in rollouts]), getattr(whole, name))
    other_step = method.loss(batch, 4).rollout
    method.seed += 1
    for other in (other_step, method.loss(batch, 3).rollout):
        assert not torch.equal(other.context, whole.context)
        assert not torch.equal(other.samples, whole.samples)


def test_every_draw_has_a_stream_of_its_own(pair: Path) -> None:
    """Noise, samples and dropped conditions are what the table of streams says, and none is another's."""
    recipe = tiny.recipe(pair, "method.policy_mode=eval", "method.condition_drop=0.5", "method.context_noise=0.5")
    method = build(recipe)
    batch = batches(recipe).at(3)
    rollout = method.loss(batch, 3).rollout

    def draws(*shape: int, stream: Stream) -> Tensor:
        return uniforms(recipe.seed, 3, batch.positions, shape, stream=stream)

    noise = draws(16, 2, stream=Stream.CONTEXT_NOISE)
    assert torch.equal(rollout.context, objective.corrupt(rollout.targets, 0.5, 32, uniforms=noise))
    with torch.no_grad():
        logits = method.model.logits(rollout.context, rollout.condition)
    samples = objective.sample_tokens(logits, 4, uniforms=draws(4, 16, stream=Stream.SAMPLES))
    assert torch.equal(rollout.samples, samples)
    dropped = draws(stream=Stream.CONDITION_DROP) < 0.5
    assert torch.equal(rollout.condition == tiny.GENERATOR.num_classes, dropped)


def test_released_noise_may_leave_a_token_as_it_is(pair: Path) -> None:
    rates = []
    for compat in ("false", "true"):
        recipe = tiny.recipe(pair, "method.context_noise=1", f"method.compat.uniform_noise={compat}")
        rollout = build(recipe).loss(batches(recipe).at(0), 0).rollout
        rates.append((rollout.context != rollout.targets).float().mean().item())
    assert rates[0] == 1.0  # paper Eq. 28: another token, always
    assert rates[1] < 1.0


def test_samples_follow_the_teacher_forced_distribution(pair: Path) -> None:
    recipe = tiny.recipe(pair, "method.policy_mode=eval", "method.group_size=400", "training.batch_size=2")
    method = build(recipe)
    batch = batches(recipe).at(0)
    rollout = method.loss(batch, 0).rollout
    probabilities = method.model.logits(rollout.context, rollout.condition).softmax(-1)
    counts = F.one_hot(rollout.samples, tiny.GENERATOR.vocab_size).sum(dim=(0, 1, 2))
    expected = 400 * probabilities.sum(dim=(0, 1))
    spread = (400 * (probabilities * (1 - probabilities)).sum(dim=(0, 1))).sqrt()
    assert ((counts - expected).abs() < 4 * spread).all()
