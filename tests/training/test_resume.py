"""A run that is stopped, by whatever means, and resumed ends where it would have ended anyway."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from training_runs import contents, crash, numbers, quiet, same, steps_saved, weights

from varpi.cli.main import main
from varpi.training import read_metrics
from varpi.training.logging import Logger


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ((), "va_pi"),
        (("data.workers=2",), "va_pi"),
        (("training.updates_per_batch=2", "training.micro_batch=4"), "va_pi"),
        (("method.prior=kl",), "va_pi"),
        (("validation.every=2", "validation.patience=3"), "va_pi"),
        (("optimizer.schedule=cosine", "optimizer.warmup_steps=3"), "next_token"),
    ],
    ids=["plain", "workers", "updates_per_batch", "kl", "validation", "schedule"],
)
def test_a_crash_changes_nothing(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...], method: str
) -> None:
    """Dropout is on, and the crash comes in mid-epoch, one step past a checkpoint."""
    recipe = tiny.recipe(pair, *settings, "training.save_every=2", method=method)
    through = quiet(recipe, tmp_path / "through")
    run = tmp_path / "run"
    crash(monkeypatch, recipe, run, 5)
    assert not (run / "model.safetensors").exists() or recipe.validation is not None
    assert steps_saved(run) == [2, 4]
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 2, 3, 4, 5]
    quiet(recipe, run, resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)  # and no step is there twice
    assert steps_saved(run) == steps_saved(through)


def test_a_crash_before_the_first_checkpoint(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(pair, "training.steps=3")
    through = quiet(recipe, tmp_path / "through")
    crash(monkeypatch, recipe, tmp_path / "run", 2)
    run = quiet(recipe, tmp_path / "run", resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)


def test_a_crash_while_the_run_begins(pair: Path, tmp_path: Path) -> None:
    """Before the recipe was in place: only what was being written is there."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".writing-recipe.yaml").write_text("met")
    quiet(tiny.recipe(pair, "training.steps=1"), run, resume=True)
    assert len(read_metrics(run)) == 1


def test_a_half_written_log_line_is_dropped(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(pair, "training.steps=4", "training.save_every=2")
    run = tmp_path / "run"
    crash(monkeypatch, recipe, run, 3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    quiet(recipe, run, resume=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_finished_run_stays_as_it_is(pair: Path, tmp_path: Path) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=2"), tmp_path / "run")
    before, model = contents(run), weights(run)
    quiet(tiny.recipe(pair, "training.steps=2"), run, resume=True)
    assert same(weights(run), model)
    after = contents(run)
    del before["model.safetensors"], after["model.safetensors"]  # written again, its metadata in any order
    assert after == before


def test_a_run_that_lost_patience_is_finished(pair: Path, tmp_path: Path) -> None:
    """Weights that only get worse: it stops, keeps the best ones, and a resume trains no further."""
    recipe = tiny.recipe(
        pair,
        "validation.every=1",
        "validation.patience=2",
        "training.steps=50",
        "training.save_every=1",
        "optimizer.learning_rate=0.3",
    )
    run = quiet(recipe, tmp_path / "run")
    losses = [row["validation_loss"] for row in read_metrics(run) if "validation_loss" in row]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 50
    with safe_open(run / "model.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == str(best + 1)
    before = contents(run)
    quiet(recipe, run, resume=True)
    assert contents(run) == before


def test_longer_training_continues_a_finished_run(pair: Path, tmp_path: Path) -> None:
    through = quiet(tiny.recipe(pair, "training.steps=5"), tmp_path / "through")
    run = quiet(tiny.recipe(pair, "training.steps=3"), tmp_path / "run")
    quiet(tiny.recipe(pair, "training.steps=5"), run, resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)


def test_sigterm_saves_and_exits_zero(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(pair)
    through = quiet(recipe, tmp_path / "through")
    run = tmp_path / "run"
    log = Logger.log

    def logged(self: Logger, number: int, metrics: dict[str, float]) -> None:
        log(self, number, metrics)
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "log", logged)
        assert main(["train", str(pair / "va_pi.yaml"), "--output", str(run), "--device", "cpu"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert steps_saved(run) == [3]
    assert not (run / "model.safetensors").exists()
    quiet(recipe, run, resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)


@pytest.mark.timeout(900)  # five program starts, on a machine that may be busy
def test_sigkill_at_random_moments(pair: Path, tmp_path: Path) -> None:
    """The short form of tests/soak.py: three SIGKILLs and a SIGTERM, each at a moment nobody chose."""
    settings = ["training.steps=60", "training.save_every=3"]
    through = quiet(tiny.recipe(pair, *settings), tmp_path / "through")
    run = tmp_path / "run"
    moments = random.Random()
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        command = ["train", str(pair / "va_pi.yaml"), "--output", str(run), "--device", "cpu", "--resume"]
        for setting in settings:
            command += ["--set", setting]
        process = subprocess.Popen(
            [sys.executable, "-m", "varpi", *command],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            stderr=subprocess.DEVNULL,
        )
        begun = len(lines(run))
        target = begun + moments.randint(1, 8)
        while process.poll() is None and len(lines(run)) < target:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        process.send_signal(number)
        code = process.wait()
        assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    quiet(tiny.recipe(pair, *settings), run, resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)


def lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []
