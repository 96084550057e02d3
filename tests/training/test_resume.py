"""A run that is stopped, by whatever means, and resumed ends where it would have ended anyway."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict_saver import save
from training_runs import contents, crash, numbers, quiet, same, steps_saved, weights

from varpi.cli.main import main
from varpi.errors import VarpiError
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
        (("optimizer.state_precision=bf16", "training.precision=bf16"), "va_pi"),
        (("optimizer.schedule=cosine", "optimizer.warmup_steps=3"), "next_token"),
    ],
    ids=["plain", "workers", "updates_per_batch", "kl", "validation", "bf16", "schedule"],
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


def test_training_goes_on_while_a_checkpoint_is_written(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state of its step, not of the steps since."""
    through = quiet(tiny.recipe(pair, "training.ema=0.5", "training.save_every=2"), tmp_path / "through")
    recipe = tiny.recipe(pair, "training.ema=0.5", "training.save_every=2", "training.save_in_background=true")
    run, waited = tmp_path / "run", []

    def after_the_next_step(state: Any, *, checkpoint_id: Path, **settings: Any) -> Any:
        following = int(checkpoint_id.name[-8:]) + 1
        if following < 6:
            until = time.monotonic() + 60
            while read_metrics(run)[-1]["step"] < following and time.monotonic() < until:
                time.sleep(0.01)
            waited.append((following, read_metrics(run)[-1]["step"]))
        return save(state, checkpoint_id=checkpoint_id, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("varpi.training.state.save", after_the_next_step)
        crash(patch, recipe, run, 5)
    assert waited == [(3, 3), (5, 5)]
    assert steps_saved(run) == [2, 4]
    quiet(recipe, run, resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)


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


def test_a_damaged_log_does_not_stop_a_healthy_run(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny.recipe(pair, "training.steps=4", "training.save_every=2")
    through = quiet(recipe, tmp_path / "through")
    run = tmp_path / "run"
    crash(monkeypatch, recipe, run, 3)
    good = (run / "metrics.jsonl").read_bytes().splitlines()
    junk = [b"\xff\x00", b"[" * 100_000, b"[1, 2]", b'{"loss": 1}', b'{"step": "2"}', b"1" * 5000]
    (run / "metrics.jsonl").write_bytes(b"\n".join([good[0], *junk, *good[1:]]) + b"\n")
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    quiet(recipe, run, resume=True)
    assert f"{run / 'metrics.jsonl'}: dropped 6 damaged line(s), the first is line 2" in caplog.text
    assert numbers(run) == numbers(through)
    assert same(weights(run), weights(through))


def test_a_log_that_is_no_file(pair: Path, tmp_path: Path) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=1"), tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    with pytest.raises(VarpiError, match=r"metrics\.jsonl: cannot be written to .*; move it away"):
        quiet(tiny.recipe(pair, "training.steps=2"), run, resume=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"[" * 100_000, b"\xff", b"7"])
def test_a_damaged_note_on_the_data(pair: Path, tmp_path: Path, content: bytes) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=1"), tmp_path / "run")
    (run / "data.json").write_bytes(content)
    with pytest.raises(VarpiError, match=r"data\.json: does not say what data .* if it is the same, delete the file$"):
        quiet(tiny.recipe(pair, "training.steps=2"), run, resume=True)
    (run / "data.json").unlink()
    quiet(tiny.recipe(pair, "training.steps=2"), run, resume=True)
    assert steps_saved(run) == [1, 2]


def untouched(run: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with the time it was last written."""
    return {name: ((run / name).stat().st_mtime_ns, data) for name, data in contents(run).items()}


@pytest.mark.parametrize("settings", [(), ("validation.every=1",)], ids=["plain", "validation"])
def test_a_finished_run_stays_as_it_is(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    """No file is written again, and nothing is loaded."""
    recipe = tiny.recipe(pair, "training.steps=2", *settings)
    run = quiet(recipe, tmp_path / "run")
    before = untouched(run)
    monkeypatch.setattr("varpi.training.loop.open_batches", None)
    monkeypatch.setattr("varpi.training.loop.build_method", None)
    quiet(recipe, run, resume=True)
    assert untouched(run) == before


def test_a_finished_run_that_lost_its_weights_writes_them_again(pair: Path, tmp_path: Path) -> None:
    """So does one that died before they were written, or was made longer and died then."""
    run = quiet(tiny.recipe(pair, "training.steps=2"), tmp_path / "run")
    short = (run / "model.safetensors").read_bytes()
    quiet(tiny.recipe(pair, "training.steps=3"), run, resume=True)
    whole = weights(run)
    for left in (None, short):
        (run / "model.safetensors").unlink()
        if left is not None:
            (run / "model.safetensors").write_bytes(left)
        quiet(tiny.recipe(pair, "training.steps=3"), run, resume=True)
        assert same(weights(run), whole)


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
    before = untouched(run)
    quiet(recipe, run, resume=True)
    assert untouched(run) == before


def test_longer_training_continues_a_finished_run(pair: Path, tmp_path: Path) -> None:
    through = quiet(tiny.recipe(pair, "training.steps=5"), tmp_path / "through")
    run = quiet(tiny.recipe(pair, "training.steps=3"), tmp_path / "run")
    quiet(tiny.recipe(pair, "training.steps=5"), run, resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_has_an_exit_code(
    pair: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    recipe = tiny.recipe(pair)
    through = quiet(recipe, tmp_path / "through")
    run = tmp_path / "run"
    log = Logger.log

    def logged(self: Logger, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "log", logged)
        assert main(["train", str(pair / "va_pi.yaml"), "--output", str(run), "--device", "cpu"]) == code
    assert signal.getsignal(number) is before
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"varpi train: stopped at step 3 of 6, saved in {run}; continue with --resume"
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
        assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    quiet(tiny.recipe(pair, *settings), run, resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)


def lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []
