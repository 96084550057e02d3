"""Damaged checkpoints, full disks, losses that are not numbers, images that cannot be read."""

import errno
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save
from training_runs import contents, crash, numbers, quiet, same, steps_saved, weights

from varpi.cli.main import main
from varpi.errors import VarpiError
from varpi.methods import build_method
from varpi.methods.va_pi import VaPi
from varpi.runtime.files import line
from varpi.training import read_metrics
from varpi.training.trouble import EqualRewards

# -- checkpoints that are damaged or cannot be written


def damage_byte(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:1000])


def lose_index(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def lose_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("harm", [damage_byte, truncate, lose_index, lose_manifest])
def test_a_damaged_checkpoint_is_passed_over(
    pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    through = quiet(tiny.recipe(pair, "training.steps=4"), tmp_path / "through")
    run = quiet(tiny.recipe(pair, "training.steps=3", "training.save_every=1"), tmp_path / "run")
    harm(run / "checkpoints" / "step-00000003")
    with caplog.at_level(logging.WARNING):
        quiet(tiny.recipe(pair, "training.steps=4", "training.save_every=1"), run, resume=True)
    (warning,) = [record.getMessage() for record in caplog.records if "trying an older checkpoint" in record.message]
    assert "step-00000003" in warning
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)


def test_no_whole_checkpoint_is_an_error(pair: Path, tmp_path: Path) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=2", "training.save_every=1"), tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        damage_byte(checkpoint)
    before = contents(run)
    with pytest.raises(VarpiError, match=r"no checkpoint is whole: .*step-00000002.* is damaged"):
        quiet(tiny.recipe(pair, "training.steps=3", "training.save_every=1"), run, resume=True)
    assert contents(run) == before


@pytest.mark.parametrize(("wrapped", "background"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_full_disk_while_saving(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool, background: bool
) -> None:
    settings = ("training.steps=4", "training.save_every=1", f"training.save_in_background={background}")
    recipe = tiny.recipe(pair, *settings)
    through = quiet(recipe, tmp_path / "through")
    run = tmp_path / "run"

    def full(state: Any, *, checkpoint_id: Path, **settings: Any) -> Any:
        if checkpoint_id.name != ".writing-step-00000003":
            return save(state, checkpoint_id=checkpoint_id, **settings)
        (checkpoint_id / "__0_0.distcp").write_bytes(b"part")
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise CheckpointException("write", {0: (error, None)}) if wrapped else error  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr("varpi.training.state.save", full)
        with pytest.raises(VarpiError) as caught:
            quiet(recipe, run)
    assert str(caught.value) == (
        f"{run / 'checkpoints' / 'step-00000003'}: the checkpoint could not be written (no space left on the disk); "
        "the newest checkpoint is step-00000002"
    )
    assert steps_saved(run) == [1, 2]  # and nothing half-written beside them
    quiet(recipe, run, resume=True)
    assert same(weights(run), weights(through))


def test_an_error_leaves_time_to_a_checkpoint_under_way(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(state: Any, *, checkpoint_id: Path, **settings: Any) -> Any:
        time.sleep(1)
        return save(state, checkpoint_id=checkpoint_id, **settings)

    monkeypatch.setattr("varpi.training.state.save", slow)
    crash(
        monkeypatch, tiny.recipe(pair, "training.save_every=2", "training.save_in_background=true"), tmp_path / "run", 3
    )
    assert steps_saved(tmp_path / "run") == [2]


@pytest.mark.machine
def test_a_disk_that_is_really_full(
    pair: Path, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["training.save_every=1", "training.keep=9"]
    through = quiet(tiny.recipe(pair, *settings), tmp_path / "through")
    size = sum(path.stat().st_size for path in (through / "checkpoints" / "step-00000001").iterdir())
    (small_disk / "ballast").write_bytes(bytes(2 * 2**20 - int(3.5 * size)))
    command = ["train", str(pair / "va_pi.yaml"), "--output", str(small_disk / "run"), "--device", "cpu"]
    for setting in settings:
        command += ["--set", setting]
    assert main(command) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("varpi train: ")
    assert "no space left on the disk" in message
    assert steps_saved(small_disk / "run") == [1, 2, 3]
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert main([*command, "--resume"]) == 0
    assert same(weights(small_disk / "run"), weights(through))
    assert numbers(small_disk / "run") == numbers(through)


# -- what is not a number


class Poisoned:
    """A method whose loss, or whose gradient alone, is not finite in chosen steps."""

    def __init__(self, method: VaPi, steps: set[int], gradient_only: bool) -> None:
        self.method, self.steps, self.gradient_only = method, steps, gradient_only

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def loss(self, batch: Any, step: int, rollout: Any = None) -> Any:
        outcome = self.method.loss(batch, step, rollout)
        if step in self.steps and self.gradient_only:
            outcome.loss = outcome.loss + (self.method.model.output.weight * 0).sum().sqrt()  # 0, with gradient 0 · ∞
        elif step in self.steps:
            outcome.loss = outcome.loss * math.nan
        return outcome


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def apply(*steps: int, gradient_only: bool = False) -> None:
        def build(*arguments: Any) -> Any:
            return Poisoned(build_method(*arguments), set(steps), gradient_only)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr("varpi.training.loop.build_method", build)

    return apply


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_non_finite_update_is_skipped_and_counted(
    pair: Path, tmp_path: Path, poison: Callable[..., None], gradient_only: bool
) -> None:
    poison(0, 2, 3, gradient_only=gradient_only)
    run = quiet(tiny.recipe(pair, "training.save_every=1", "training.keep=9"), tmp_path / "run")
    rows = read_metrics(run)
    assert [row["skipped"] for row in rows] == [1, 1, 2, 3, 3, 3]
    assert [math.isfinite(row["loss"]) for row in rows] == (
        [True] * 6 if gradient_only else [False, True, False, False, True, True]
    )
    assert [math.isfinite(row["gradient_norm"]) for row in rows] == [False, True, False, False, True, True]
    trainer = json.loads((run / "checkpoints" / "step-00000006" / "trainer.json").read_text())
    assert (trainer["skipped"], trainer["skipped_in_a_row"]) == (3, 0)
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_skips_survive_a_resume(
    pair: Path, tmp_path: Path, poison: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when there was no update at all before the checkpoint."""
    poison(0, 1, 4)
    recipe = tiny.recipe(pair, "training.save_every=1", "training.max_skipped=3")
    through = quiet(recipe, tmp_path / "through")
    crash(monkeypatch, recipe, tmp_path / "run", 3)
    run = quiet(recipe, tmp_path / "run", resume=True)
    assert same(weights(run), weights(through))
    early = tmp_path / "early"
    crash(monkeypatch, recipe, early, 2)
    quiet(recipe, early, resume=True)
    assert same(weights(early), weights(through))


def test_too_many_skips_stop_the_run(pair: Path, tmp_path: Path, poison: Callable[..., None]) -> None:
    poison(1, 2, 3)
    recipe = tiny.recipe(pair, "training.save_every=1", "training.max_skipped=3")
    with pytest.raises(VarpiError) as caught:
        quiet(recipe, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("step 4: 3 updates in a row had a non-finite loss or gradient (loss, gradient_norm")
    assert message.endswith(
        "were skipped; lower optimizer.learning_rate, try training.precision: fp32, or check the images; "
        "the newest checkpoint is step-00000003"
    )
    newest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "trainer.json").read_text())
    assert newest["skipped_in_a_row"] == 2


# -- what torch raises


def failing(error: Exception, step: int) -> Any:
    def build(*arguments: Any) -> Any:
        method = build_method(*arguments)
        loss = method.loss

        def fail(batch: Any, number: int, rollout: Any = None) -> Any:
            if number == step:
                raise error
            return loss(batch, number, rollout)

        method.loss = fail  # pyright: ignore[reportAttributeAccessIssue]
        return method

    return build


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
            "out of memory; use more processes, or",
        ),
        (MemoryError(), "out of memory; use more processes, or"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory; use more processes, or"),
        (OverflowError("math range error"), "a number overflowed in the update; start again with a lower optimizer.l"),
        (RuntimeError("[pair.cc:534] Connection closed by peer"), "another process of the run has ended; what it said"),
    ],
)
def test_what_and_where_and_from_where_on(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    recipe = tiny.recipe(pair, "training.steps=4", "training.save_every=2")
    through = quiet(recipe, tmp_path / "through")
    with monkeypatch.context() as patch:
        patch.setattr("varpi.training.loop.build_method", failing(error, 3))
        with pytest.raises(VarpiError) as caught:
            quiet(recipe, tmp_path / "run")
    message = str(caught.value)
    assert message.startswith(f"after step 3: {said}")
    alike = "another process" in said  # in all processes but that one, so that it is said once
    assert (f"({line(error)})" in message) is not alike
    assert message.endswith("; the newest checkpoint is step-00000002")
    run = quiet(recipe, tmp_path / "run", resume=True)
    assert same(weights(run), weights(through))


def test_a_data_worker_that_is_killed(pair: Path, tmp_path: Path) -> None:
    """As the kernel does when memory is short. In a program of its own: torch tells of it at any moment."""
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "varpi",
        "train",
        str(pair / "va_pi.yaml"),
        "--output",
        str(run),
        "--device",
        "cpu",
    ]
    for setting in ("training.steps=100000", "data.workers=1"):
        command += ["--set", setting]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    log = run / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGKILL)
    last = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == 2
    said = r"varpi train: after step \d+: a worker that loads data was killed, .*; set data\.workers lower \(.*\); "
    assert re.fullmatch(said + "there is no checkpoint yet", last)


def test_other_errors_are_not_dressed_up(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varpi.training.loop.build_method", failing(RuntimeError("shapes differ"), 0))
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        quiet(tiny.recipe(pair), tmp_path / "run")


@pytest.mark.parametrize(("rate", "said"), [("1e39", "overflowed in the update"), ("1e37", "a weight is not finite")])
def test_an_update_that_overflows(pair: Path, tmp_path: Path, rate: str, said: str) -> None:
    settings = ("training.save_every=1", f"optimizer.learning_rate={rate}", "optimizer.weight_decay=1e9")
    with pytest.raises(VarpiError) as caught:
        quiet(tiny.recipe(pair, *settings), tmp_path / "run")
    assert said in str(caught.value)
    assert str(caught.value).endswith("there is no checkpoint yet")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


# -- rewards that do not vary


def test_rewards_that_never_vary_are_said(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("varpi.tokenizers.VQ.decode", lambda self, tokens: torch.zeros(len(tokens), 3, 16, 16))
    run = quiet(tiny.recipe(pair, "training.steps=7"), tmp_path / "run")
    assert [row["equal_groups"] for row in read_metrics(run)] == [1.0] * 7
    (warning,) = [record.getMessage() for record in caplog.records if "advantages" in record.getMessage()]
    assert warning.startswith(
        "step 5: for 5 steps all advantages were 0, so the policy term taught nothing: the samples"
    )
    assert "check that tokenizer and generator belong together" in warning


def test_equal_rewards_are_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    watch, said = EqualRewards(), []
    # Seventy steps, of which the eighth had one group that was not of equals, and two that made no rollout
    for step in range(1, 71):
        equal = 0.875 if step == 8 else 1.0
        watch.see(step, {"equal_groups": equal, "entropy": 0.001, "reward_mean": -1.0} if step not in (3, 20) else {})
        said += [step for _ in caplog.records]
        caplog.clear()
    assert said == [6, 13, 59]


def test_a_collapsed_generator_is_called_so(caplog: pytest.LogCaptureFixture) -> None:
    watch = EqualRewards()
    for step in range(1, 6):
        watch.see(step, {"equal_groups": 1.0, "entropy": 0.001, "reward_mean": -1.0})
    assert "the generator always draws the same tokens (entropy 0.001 nats)" in caplog.text


def test_rewards_that_vary_are_counted(pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = quiet(tiny.recipe(pair), tmp_path / "run")
    assert all(row["equal_groups"] < 1 for row in read_metrics(run))
    assert "advantages" not in caplog.text


# -- images that cannot be read


def test_unreadable_images_are_replaced_counted_and_remembered(
    pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tiny.images(tmp_path / "images" / "train").parent
    tiny.images(images / "val", per_class=2, seed=4)
    for path in (images / "train" / "a" / "3.png", images / "val" / "b" / "1.png"):
        path.write_bytes(path.read_bytes()[:40])
    settings = [f"data.source={images}", "data.max_bad_fraction=0.5", "validation.every=3"]
    run = quiet(tiny.recipe(pair, *settings), tmp_path / "run")
    trainer = json.loads((run / "checkpoints" / "step-00000006" / "trainer.json").read_text())
    broken = f"{images}/train/a/3.png: unreadable image ("
    ((reason, (count, example)),) = trainer["left_out"].items()
    assert (reason, count) == ("unreadable", 2)  # six steps of eight are two epochs of 24
    assert example.startswith(broken)
    assert trainer["images_opened"] == 50
    assert all(math.isfinite(row["loss"]) for row in read_metrics(run) if "loss" in row)
    said = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    held_out, opened = (text.partition(": unreadable image")[0] for text in said)  # of validation once, not twice
    assert held_out == f"{images}[validation]: left out 1 of 6 held-out images: 1 unreadable ({images}/val/b/1.png"
    assert opened == f"{images}: left out 2 of 50 images: 2 unreadable ({images}/train/a/3.png"


def test_too_many_unreadable_images_stop_the_run(pair: Path, tmp_path: Path) -> None:
    images = tiny.images(tmp_path / "images")
    for path in (images / "a").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(VarpiError, match=r"too many unreadable images: .* max_bad_fraction is 0\.01; the last was"):
        quiet(tiny.recipe(pair, f"data.source={images}"), tmp_path / "run")


def test_validation_weighs_every_image_alike(pair: Path, tmp_path: Path) -> None:
    """Six held-out images in batches of 8 or of 4 have the same mean."""
    losses = []
    for size in (6, 4, 1):
        settings = ("validation.every=1", "training.steps=1", f"training.micro_batch={size}", "method.policy_mode=eval")
        run = quiet(tiny.recipe(pair, *settings), tmp_path / str(size))
        losses += [row["validation_loss"] for row in read_metrics(run) if "validation_loss" in row]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
