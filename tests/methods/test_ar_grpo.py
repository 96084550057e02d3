"""AR-GRPO: its first and second update by a plain graph, whose rollouts are whose, and runs that lose nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from training_runs import quiet, same, steps_saved, weights

from varpi.data import Batch, Batches, open_dataset
from varpi.errors import VarpiError
from varpi.methods import build_method
from varpi.recipe import Recipe
from varpi.runtime.processes import World
from varpi.runtime.randomness import Stream
from varpi.sampling.generate import generate_with
from varpi.sampling.settings import Sampling
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress
from varpi.weights import load_generator, load_tokenizer


def recipe(pair: Path, *settings: str) -> Recipe:
    return tiny.recipe(pair, *settings, method="ar_grpo")


def build(recipe: Recipe) -> Any:
    return build_method(recipe, 3, "cpu")


def batch_of(recipe: Recipe, number: int = 0) -> Batch:
    dataset = open_dataset(recipe.data.source, image_size=recipe.data.image_size)
    return Batches(dataset, batch_size=recipe.training.batch_size, seed=recipe.seed).at(number)


def chosen(logits: Tensor, samples: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, samples[..., None])[..., 0]


def test_two_updates_by_a_plain_graph(pair: Path) -> None:
    asked = recipe(pair, "method.kl_weight=0.5", "generator.dropout=0.5")
    method, batch = build(asked), batch_of(asked, 3)
    generator = load_generator(pair / "generator.safetensors")
    tokenizer = load_tokenizer(pair / "tokenizer.safetensors")
    condition = torch.as_tensor(batch.condition).repeat_interleave(4)
    draws = method.uniforms(batch, 3, (4, 16), Stream.SAMPLES).view(32, 16)
    samples = generate_with(generator, condition, Sampling(guidance_scale=2.0), draws=draws)
    images = (127.5 * tokenizer.decode(samples) + 128).clamp(0, 255).byte()
    rewards = (images.float().mean((1, 2, 3)) / 255).view(8, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)

    first = method.loss(batch, 3)
    assert torch.equal(first.rollout.samples, samples)
    torch.testing.assert_close(first.rollout.advantages, advantages, atol=1e-4, rtol=1e-4)
    assert first.metrics["ratio_mean"] == 1
    assert first.metrics["clip_fraction"] == 0
    torch.testing.assert_close(first.metrics["reward_mean"], rewards.mean())
    torch.testing.assert_close(first.metrics["reward_function"], rewards.mean())
    old = chosen(generator.logits(samples, condition), samples)
    plain = -(advantages.view(32, 1) * (old - old.detach()).exp()).mean()  # the KL and its gradient are still 0
    expected = torch.autograd.grad(plain, list(generator.parameters()))
    found = torch.autograd.grad(first.loss, list(method.model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)

    with torch.no_grad():
        for mine, other in zip(method.model.parameters(), generator.parameters(), strict=True):
            mine += 0.1 * torch.randn_like(mine)
            other.copy_(mine)
    second = method.loss(batch, 3, first.rollout)
    new = chosen(generator.logits(samples, condition), samples)
    ratio = (new - old.detach()).exp()
    weighted = torch.minimum(advantages.view(32, 1) * ratio, advantages.view(32, 1) * ratio.clamp(0.8, 1.2))
    kl = ((old - new).exp() - (old - new) - 1).mean()
    assert 0 < second.metrics["clip_fraction"] < 1
    torch.testing.assert_close(second.metrics["kl"], kl.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(second.loss, 0.5 * kl - weighted.mean(), atol=1e-5, rtol=1e-4)


def test_rollouts_belong_to_the_conditions_place(pair: Path) -> None:
    """However a batch is cut, and however many images are made at once."""
    asked = recipe(pair)
    batch = batch_of(asked)
    whole = build(asked).loss(batch, 2).rollout
    parts = []
    for places in (slice(0, 3), slice(3, 8)):
        part = dataclasses.replace(
            batch,
            images=batch.images[places],
            condition=torch.as_tensor(batch.condition)[places],
            positions=batch.positions[places],
        )
        parts.append(build(recipe(pair, "method.rollout_batch=5")).loss(part, 2).rollout.samples)
    assert torch.equal(torch.cat(parts), whole.samples)
    assert not torch.equal(build(asked).loss(batch, 3).rollout.samples, whole.samples)
    groups = whole.samples.view(8, 4, 16)
    assert not torch.equal(groups[:, 0], groups[:, 1])


def test_without_a_kl_there_is_no_frozen_copy(pair: Path) -> None:
    method = build(recipe(pair, "method.kl_weight=0"))
    assert (method.reference, method.frozen) == (None, ())
    assert "kl" not in method.loss(batch_of(recipe(pair)), 0).metrics
    assert build(recipe(pair)).reference is not None
    assert build(recipe(pair, "lora.rank=2")).reference is None


@pytest.mark.parametrize("settings", [(), ("training.precision=bf16", "lora.rank=4", "training.updates_per_batch=2")])
def test_images_become_what_is_rewarded(pair: Path, settings: tuple[str, ...]) -> None:
    asked = recipe(pair, "method.group_size=8", "method.kl_weight=0", "optimizer.learning_rate=1e-2", *settings)
    method, batch = build(asked), batch_of(asked)
    trainer = Trainer(asked, method, make_optimizer(method.model, asked.optimizer), World(0, 1, "cpu"))
    progress, rewards = Progress(), []
    for number in range(12):
        rewards += [metrics.get("reward_mean") for metrics in trainer.updates(batch, number, progress)]
    rewards = [reward for reward in rewards if reward is not None]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.003  # half a deviation within a group, 7 of such a mean


def test_captions_reach_the_reward(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of captions is cut with its micro-batches, and each caption stands for a group."""
    asked = recipe(pair, "training.micro_batch=3")
    method, batch = build(asked), batch_of(asked)
    ids, captions = batch.condition, [f"caption {i}" for i in range(8)]
    monkeypatch.setattr("varpi.training.loop.prepare_condition", lambda *_: ids)
    seen: list[str] = []

    def score(images: Tensor, asked: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        seen.extend(asked)
        return images.float().mean((1, 2, 3)), {}

    method.rewards = score
    trainer = Trainer(asked, method, make_optimizer(method.model, asked.optimizer), World(0, 1, "cpu"))
    next(trainer.updates(dataclasses.replace(batch, condition=captions), 0, Progress()))
    assert seen == [caption for caption in captions for _ in range(4)]


CALLS = {"left": 0}


def fickle(images: Tensor, asked: Tensor) -> Tensor:
    """A reward that is there for so many calls."""
    CALLS["left"] -= 1
    if CALLS["left"] < 0:
        raise ConnectionError("the scorer\nis gone")
    return tiny.brightness(images, asked)


def test_a_reward_that_fails_loses_nothing(pair: Path, tmp_path: Path) -> None:
    asked = recipe(
        pair, "method.rewards.function.path=test_ar_grpo:fickle", "training.save_every=1", "training.steps=4"
    )
    CALLS["left"] = 99
    whole = quiet(asked, tmp_path / "whole")
    CALLS["left"] = 2
    with pytest.raises(VarpiError) as caught:
        quiet(asked, tmp_path / "run")
    assert str(caught.value) == (
        "after step 2: method.rewards.function: raised ConnectionError: the scorer; the newest checkpoint is "
        "step-00000002"
    )
    assert steps_saved(tmp_path / "run") == [1, 2]
    CALLS["left"] = 99
    assert same(weights(quiet(asked, tmp_path / "run", resume=True)), weights(whole))


def test_features_without_captions_are_refused(pair: Path) -> None:
    values = recipe(pair)
    data = values.data.model_copy(update={"caption_features": "features"})
    with pytest.raises(VarpiError, match=r"ar_grpo scores images with their captions, which data\.caption_features"):
        build_method(values.model_copy(update={"data": data}), None, "cpu")
