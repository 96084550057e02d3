"""The average of the weights: its numbers, that it is what a run gives back, and that training knows nothing of it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from launch import several
from torch import nn
from training_runs import crash, numbers, quiet, same, weights

from varpi.errors import VarpiError
from varpi.recipe import load_recipe
from varpi.studies.study import _kept
from varpi.training.average import Average
from varpi.training.loop import Trainer

EMA = ("training.ema=0.5", "validation.every=2", "validation.split=validation", "training.save_every=2")


def without_validation(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "loss" in row]


def test_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False)
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    model.register_parameter("frozen", frozen)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    average = Average(model, 0.75)
    for value in ([[5.0, 2.0]], [[5.0, 10.0]]):
        with torch.no_grad():
            model.weight.copy_(torch.tensor(value))
        average.update()
    assert average.weights.keys() == {"weight"}
    assert average.weights["weight"].tolist() == [[0.75 * 2 + 0.25 * 5, 0.75 * 2 + 0.25 * 10]]
    with average.in_place():
        assert model.weight.tolist() == [[2.75, 4.0]]
    assert model.weight.tolist() == [[5.0, 10.0]]
    assert average.weights["weight"].tolist() == [[2.75, 4.0]]


def test_a_run_gives_back_the_average_of_its_weights(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same updates as without it; what is written is the mean that the weights after each of them make."""
    passed: list[dict[str, torch.Tensor]] = []
    step = Trainer._step

    def seen(self: Trainer, *given: Any) -> None:
        if not passed:
            passed.append({name: value.clone() for name, value in self.method.model.state_dict().items()})
        step(self, *given)
        passed.append({name: value.clone() for name, value in self.method.model.state_dict().items()})

    monkeypatch.setattr(Trainer, "_step", seen)
    plain = quiet(tiny.recipe(pair), tmp_path / "plain")
    assert same(weights(plain), passed[-1])
    expected = passed[0]
    for state in passed[1:]:
        expected = {name: torch.lerp(value, state[name], 0.25) for name, value in expected.items()}
    averaged = quiet(tiny.recipe(pair, "training.ema=0.75"), tmp_path / "averaged")
    assert without_validation(numbers(averaged)) == numbers(plain)
    assert not same(weights(averaged), weights(plain))
    for name, value in weights(averaged).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_validation_measures_the_average(pair: Path, tmp_path: Path) -> None:
    every = ("validation.every=6", "validation.split=validation")
    rows = {
        decay: numbers(quiet(tiny.recipe(pair, *every, *setting), tmp_path / decay))
        for decay, setting in (("none", ()), ("a", ("training.ema=0.9",)), ("b", ("training.ema=0.999999",)))
    }
    losses = {decay: found[-1]["validation_loss"] for decay, found in rows.items()}
    start = numbers(quiet(tiny.recipe(pair, *every, "optimizer.learning_rate=1e-30"), tmp_path / "still"))[-1][
        "validation_loss"
    ]
    assert losses["b"] == pytest.approx(start, abs=1e-3)  # hardly moved
    assert losses["none"] < losses["a"] < start - 1e-2


def test_a_crash_changes_nothing(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quiet(tiny.recipe(pair, *EMA), tmp_path / "whole")
    crash(monkeypatch, tiny.recipe(pair, *EMA), tmp_path / "cut", 5)
    resumed = quiet(tiny.recipe(pair, *EMA), tmp_path / "cut", resume=True)
    assert same(weights(whole), weights(resumed))
    assert numbers(whole) == numbers(resumed)


def test_a_skipped_update_is_not_averaged(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run with skips would average the same weights several times."""
    taken = []
    monkeypatch.setattr(Average, "update", lambda self: taken.append(1))
    loss = tiny.recipe(pair, "training.ema=0.5", "training.steps=3")
    original = Trainer._step

    def poisoned(self: Trainer, metrics: Any, progress: Any) -> None:
        if progress.step == 1:
            metrics["gradient_norm"] = float("nan")
        original(self, metrics, progress)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    quiet(loss, tmp_path / "run")
    assert len(taken) == 2


def test_another_decay_is_another_run(pair: Path, tmp_path: Path) -> None:
    quiet(tiny.recipe(pair, *EMA, "training.steps=2"), tmp_path / "run")
    with pytest.raises(VarpiError, match=r"training\.ema is 0\.5 there and 0\.9 here"):
        quiet(tiny.recipe(pair, *EMA, "training.ema=0.9"), tmp_path / "run", resume=True)


def test_two_processes_average_as_one(pair: Path, tmp_path: Path) -> None:
    """Sharded and resumed, with validation between the updates, which leave nothing of the average in the model."""
    settings = (*EMA, "generator.dropout=0", "optimizer.eps=1e-3", "method.condition_drop=0.3")
    one = quiet(tiny.recipe(pair, *settings, method="next_token"), tmp_path / "one")
    given = [part for setting in settings for part in ("--set", setting)]
    command = ["train", pair / "next_token.yaml", "--output", tmp_path / "two", "--resume", *given]
    several(2, [*command, "--set", "training.steps=4"])
    several(2, command)
    for row, other in zip(numbers(tmp_path / "two"), numbers(one), strict=True):
        for name in ("loss", "validation_loss"):
            assert (name in row) == (name in other)
            assert row.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=0, atol=1e-5)


def test_a_study_begun_before_there_was_an_average_goes_on() -> None:
    """What a recipe's job depends on names neither an average that is not asked for nor any preview."""
    kept = {
        name: _kept(load_recipe("digits", settings))
        for name, settings in (("plain", []), ("shown", ["preview.every=1"]), ("averaged", ["training.ema=0.9"]))
    }
    assert kept["plain"] == kept["shown"]
    assert "training.ema" not in kept["plain"]
    assert kept["averaged"] == {**kept["plain"], "training.ema": 0.9}
