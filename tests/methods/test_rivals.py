"""The methods that VA-π is compared with, each loss against numbers worked by hand or a plain graph."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from varpi.data import Batch, Batches, open_dataset
from varpi.errors import VarpiError
from varpi.methods import build_method, teacher_forcing
from varpi.methods.cca import contrast
from varpi.recipe import Recipe
from varpi.runtime.processes import World
from varpi.training import train
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress
from varpi.weights import load_generator

RIVALS = ("ar_grpo", "cca", "gft", "guided", "ste")


def batch_of(recipe: Recipe, number: int = 0) -> Batch:
    dataset = open_dataset(recipe.data.source, image_size=recipe.data.image_size)
    return Batches(dataset, batch_size=recipe.training.batch_size, seed=recipe.seed).at(number)


def build(recipe: Recipe) -> Any:
    return build_method(recipe, 3, "cpu")


def gradients(loss: Tensor, method: Any) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(method.model.parameters()))])


# -- cca


def test_contrast_by_hand():
    """β = 1, λ = 3; the first pair is a true negative, the second is none and so counts as a positive."""
    gaps, negative_gaps = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])
    loss, metrics = contrast(
        gaps, negative_gaps, contrasting=torch.tensor([True, False]), beta=1.0, negative_weight=3.0
    )

    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    positive = (log_sigmoid(1) + log_sigmoid(-1)) / 2
    negative = (3 * log_sigmoid(-2) + log_sigmoid(0.5)) / 2
    assert loss.item() == pytest.approx(-(positive + negative) / 3)
    assert metrics["gap"].item() == 0.0
    assert metrics["negative_gap"].item() == 2.0


def test_cca_begins_without_gaps_and_learns_to_contrast(pair: Path) -> None:
    recipe = tiny.recipe(
        pair,
        "generator.dropout=0",
        "method.beta=0.1",
        "method.negative_weight=1",
        "optimizer.learning_rate=3e-3",
        method="cca",
    )
    method, batch = build(recipe), batch_of(recipe)
    trainer = Trainer(recipe, method, make_optimizer(method.model, recipe.optimizer), World(0, 1, "cpu"))
    start = [p.clone() for p in method.reference.parameters()]
    progress = Progress()
    log = [next(trainer.updates(batch, number, progress)) for number in range(25)]
    assert log[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-5)  # both halves at σ(0)
    assert log[0]["gap"] == pytest.approx(0, abs=1e-4)
    assert log[-1]["gap"] > 1
    assert log[-1]["gap"] > log[-1]["negative_gap"] + 1
    assert all(torch.equal(a, b) for a, b in zip(start, method.reference.parameters(), strict=True))


def test_cca_without_conditions_only_raises_likelihood(pair: Path) -> None:
    """With every condition dropped nothing is a negative: the loss is that of two positives."""
    recipe = tiny.recipe(
        pair, "generator.dropout=0", "method.condition_drop=1", "method.negative_weight=7", method="cca"
    )
    method = build(recipe)
    assert method.loss(batch_of(recipe), 0).loss.item() == pytest.approx(2 * math.log(2) / 7, rel=1e-5)


# -- gft


def test_gft_by_a_plain_graph(pair: Path) -> None:
    recipe = tiny.recipe(pair, "generator.dropout=0", "method.condition_drop=0.5", "method.beta=0.5", method="gft")
    method, batch = build(recipe), batch_of(recipe, 2)
    outcome = method.loss(batch, 2)
    dropped = method.drop(batch, 2)
    assert 0 < dropped.sum() < len(dropped)
    targets, nothing = method.tokenizer.encode(batch.images), torch.full_like(batch.condition, 3)
    null = method.model.logits(targets, nothing)
    mixture = 0.5 * method.model.logits(targets, batch.condition) + 0.5 * null.detach()
    logits = torch.where(dropped[:, None, None], null, mixture)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(gradients(outcome.loss, method), gradients(expected, method), atol=1e-6, rtol=1e-4)


def test_gft_of_beta_one_is_next_token_training(pair: Path) -> None:
    losses = []
    for name, *settings in (("gft", "method.beta=1"), ("next_token",)):
        recipe = tiny.recipe(pair, "generator.dropout=0", *settings, method=name)
        losses.append(build(recipe).loss(batch_of(recipe), 0).loss)
    torch.testing.assert_close(*losses)


# -- guided


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_guided_by_a_plain_graph(pair: Path, temperature: float) -> None:
    """Under the frozen start's guided distribution, without gradient to it; null stays null where it was dropped."""
    settings = ("method.guidance=2.5", f"method.teacher_temperature={temperature}")
    recipe = tiny.recipe(pair, "generator.dropout=0", "method.condition_drop=0.5", *settings, method="guided")
    method, batch = build(recipe), batch_of(recipe, 2)
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.mul_(1.1)  # no longer the start
    outcome, dropped = method.loss(batch, 2), method.drop(batch, 2)
    assert 0 < dropped.sum() < len(dropped)
    start, targets = load_generator(pair / "generator.safetensors"), method.tokenizer.encode(batch.images)
    nothing = torch.full_like(batch.condition, 3)
    condition = torch.where(dropped, nothing, batch.condition)
    with torch.no_grad():
        null = start.eval().logits(targets, nothing)
        guided = ((null + 2.5 * (start.logits(targets, condition) - null)) / temperature).softmax(-1)
    log_probs = method.model.logits(targets, condition).log_softmax(-1)
    expected = -(guided * log_probs).sum(-1).mean()
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(gradients(outcome.loss, method), gradients(expected, method), atol=1e-6, rtol=1e-4)


# -- ste


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ste_is_the_straight_through_graph(pair: Path, temperature: float) -> None:
    recipe = tiny.recipe(
        pair, "generator.dropout=0", f"method.temperature={temperature}", "method.prior_weight=0.3",
        "method.condition_drop=0", method="ste",
    )  # fmt: skip
    method, batch = build(recipe), batch_of(recipe)
    outcome = method.loss(batch, 0)
    targets, codebook = method.tokenizer.encode(batch.images), method.tokenizer.code_vectors()
    logits = method.model.logits(targets, batch.condition)
    soft = (logits / temperature).softmax(-1) @ codebook
    codes = codebook[logits.argmax(-1)] + soft - soft.detach()
    images = method.tokenizer.decode_codes(codes.transpose(1, 2).unflatten(2, (4, 4)))
    expected = F.mse_loss(images, batch.images) + 0.3 * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(gradients(outcome.loss, method), gradients(expected, method), atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(outcome.metrics["reward_mean"], -F.mse_loss(images, batch.images))


def test_ste_with_gumbel_noise_decodes_samples(pair: Path) -> None:
    """Another token than the most probable is decoded somewhere, and the draws belong to the images."""
    recipes = [
        tiny.recipe(pair, "generator.dropout=0", f"method.gumbel={on}", method="ste") for on in ("false", "true")
    ]
    plain, noisy, again = (build(recipe).loss(batch_of(recipe), 0).metrics for recipe in (*recipes, recipes[1]))
    assert noisy["reward_mean"] != plain["reward_mean"]
    assert noisy["reward_mean"] == again["reward_mean"]


# -- all of them


@pytest.mark.parametrize("name", RIVALS)
def test_trains_resumes_and_loads(pair: Path, tmp_path: Path, name: str) -> None:
    recipe = tiny.recipe(pair, "training.steps=4", "training.save_every=2", method=name)
    whole = train(recipe, tmp_path / "whole", device="cpu", show=False)
    half = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 2})})
    train(half, tmp_path / "parts", device="cpu", show=False)
    parts = train(recipe, tmp_path / "parts", resume=True, device="cpu", show=False)
    found, expected = (load_generator(run / "model.safetensors").state_dict() for run in (parts, whole))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    before = load_generator(pair / "generator.safetensors").state_dict()
    assert any(not torch.equal(before[key], expected[key]) for key in expected)


def test_cca_is_refused_what_it_cannot_use(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VarpiError, match=r"method\.beta is 0"):
        tiny.recipe(pair, "method.beta=0", method="cca")
    recipe = tiny.recipe(pair, method="cca")
    text = dict(teacher_forcing.parts(recipe, 3, "cpu", reference=True))
    text["generator"].num_classes = None  # as that of a generator of captions
    monkeypatch.setattr("varpi.methods.cca.parts", lambda *_, **__: text)
    with pytest.raises(VarpiError, match="cca draws random classes"):
        build(recipe)
