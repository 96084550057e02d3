"""A run directory from a stranger runs no code; the user's own files, and other processes, are left alone."""

import fcntl
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from training_runs import contents, quiet, same, steps_saved, weights

from varpi.errors import VarpiError
from varpi.training import read_metrics
from varpi.training.checkpoint_files import read_index
from varpi.training.run_directory import RunLock
from varpi.training.state import checkpoints, newest_whole, read_progress


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


@pytest.fixture
def run(pair: Path, tmp_path: Path) -> Path:
    return quiet(tiny.recipe(pair, "training.steps=1"), tmp_path / "run")


def reseal(checkpoint: Path) -> None:
    """As whoever planted something would: make the manifest fit."""
    files = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in files
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def resume(pair: Path, run: Path) -> Path:
    return quiet(tiny.recipe(pair, "training.steps=2"), run, resume=True)


# -- nothing that is read runs code


def test_an_index_that_is_a_program(pair: Path, run: Path, tmp_path: Path) -> None:
    (checkpoint,) = checkpoints(run)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Malice(tmp_path / "touched")))
    reseal(checkpoint)
    with pytest.raises(VarpiError) as caught:
        resume(pair, run)
    assert str(caught.value) == (
        f"{run}: no checkpoint is whole: {checkpoint / '.metadata'}: names io.open, which no index of a checkpoint "
        "needs; it is not one that varpi wrote, and was not read"
    )
    assert not (tmp_path / "touched").exists()


def test_a_program_within_a_good_index(pair: Path, run: Path, tmp_path: Path) -> None:
    (checkpoint,) = checkpoints(run)
    index = FileSystemReader(checkpoint).read_metadata()
    index.planner_data = Malice(tmp_path / "touched")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    reseal(checkpoint)
    with pytest.raises(VarpiError, match=r"names io\.open, which no index of a checkpoint needs"):
        resume(pair, run)
    assert not (tmp_path / "touched").exists()


def test_a_value_that_is_a_program(pair: Path, run: Path, tmp_path: Path) -> None:
    """Such as the learning rate of a group of parameters, which torch keeps as a pickle."""
    (checkpoint,) = checkpoints(run)
    index = FileSystemReader(checkpoint).read_metadata()
    place = next(
        place
        for key, place in index.storage_data.items()
        if isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata) and key.fqn.endswith(".lr")
    )
    planted = io.BytesIO()
    torch.save(Malice(tmp_path / "touched"), planted)
    data = checkpoint / place.relative_path
    place.offset, place.length = data.stat().st_size, len(planted.getvalue())
    data.write_bytes(data.read_bytes() + planted.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    reseal(checkpoint)
    with pytest.raises(VarpiError, match=r"step-00000001: cannot be loaded into this model \(Weights only load failed"):
        resume(pair, run)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("place", ["../../../secret", "/dev/zero", "elsewhere"])
def test_an_index_that_points_elsewhere(pair: Path, run: Path, place: str) -> None:
    (checkpoint,) = checkpoints(run)
    index = FileSystemReader(checkpoint).read_metadata()
    next(iter(index.storage_data.values())).relative_path = place
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    reseal(checkpoint)
    with pytest.raises(VarpiError, match=r"\.metadata: is not the index of this checkpoint"):
        resume(pair, run)


@pytest.mark.parametrize("name", ["../other", "/dev/zero", "link"])
def test_a_manifest_that_lists_what_is_no_file_of_it(pair: Path, run: Path, name: str) -> None:
    (checkpoint,) = checkpoints(run)
    (checkpoint / "link").symlink_to("/dev/zero")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = {"bytes": 0, "sha256": ""}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VarpiError, match=r"no checkpoint is whole: .*(not a list of its files|link is damaged)"):
        resume(pair, run)


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"7", b"[" * 100_000, b'{"a": 1}', b'{".metadata": {"bytes": 1}}', b""]
)
def test_a_manifest_that_is_none(run: Path, content: bytes) -> None:
    (checkpoint,) = checkpoints(run)
    (checkpoint / "manifest.json").write_bytes(content)
    with pytest.raises(VarpiError, match=f"{checkpoint} is not a whole checkpoint") as caught:
        newest_whole(run, lambda _: None)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[]", "does not say where a run stands"),
        (b"[" * 100_000, "does not say where a run stands"),
        (b'{"step": "many"}', "does not say where a run stands (step.Input should be a valid integer)"),
        (b'{"step": 1, "cursors": [0.5]}', "does not say where a run stands (cursors.0."),
        (b'{"step": 2}', "is of step 2"),
    ],
)
def test_progress_that_is_none(run: Path, content: bytes, said: str) -> None:
    (checkpoint,) = checkpoints(run)
    (checkpoint / "trainer.json").write_bytes(content)
    reseal(checkpoint)
    with pytest.raises(VarpiError) as caught:
        newest_whole(run, lambda _: None)
    assert f"{checkpoint / 'trainer.json'}: {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_index_is_read_as_torch_reads_it(run: Path) -> None:
    (checkpoint,) = checkpoints(run)
    ours, theirs = read_index(checkpoint), FileSystemReader(checkpoint).read_metadata()
    assert isinstance(ours, Metadata)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert ours.planner_data == theirs.planner_data


def test_a_run_from_before_a_key_goes_on(pair: Path, tmp_path: Path) -> None:
    """A key that its recipe lacks had no other value than the default."""
    run = quiet(tiny.recipe(pair, "training.steps=1"), tmp_path / "run")
    text = (run / "recipe.yaml").read_text()
    assert "  state_precision: fp32\n" in text
    (run / "recipe.yaml").write_text(text.replace("  state_precision: fp32\n", ""))
    with pytest.raises(VarpiError, match=r"optimizer\.state_precision is 'fp32' there and 'bf16' here"):
        quiet(tiny.recipe(pair, "training.steps=2", "optimizer.state_precision=bf16"), run, resume=True)
    quiet(tiny.recipe(pair, "training.steps=2"), run, resume=True)
    assert read_metrics(run)[-1]["step"] == 2


# -- what is the user's stays


def test_a_users_copies_are_neither_read_nor_deleted(pair: Path, tmp_path: Path) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=2", "training.save_every=1"), tmp_path / "run")
    through = quiet(tiny.recipe(pair, "training.steps=4", "training.save_every=1"), tmp_path / "through")
    folder = run / "checkpoints"
    own = ["step-00000001-best", "step-00000009.bak", "step-9", "step-best", "step-000000009", "notes"]
    for name in own:
        shutil.copytree(folder / "step-00000001", folder / name)
    (folder / "step-00000008").write_text("a file")
    (folder / "step-00000007").symlink_to(folder / "step-00000001")
    quiet(tiny.recipe(pair, "training.steps=4", "training.save_every=1", "training.keep=1"), run, resume=True)
    assert {path.name for path in folder.iterdir()} == {*own, "step-00000004", "step-00000007", "step-00000008"}
    assert same(weights(run), weights(through))
    assert [path.name for path in checkpoints(run)] == ["step-00000004"]
    assert read_progress(folder / "step-00000004").step == 4


def test_what_was_just_written_is_not_pruned(pair: Path, tmp_path: Path) -> None:
    """Though damaged checkpoints of later steps lie beside it."""
    settings = ("training.save_every=1", "training.keep=2")
    run = quiet(tiny.recipe(pair, "training.steps=4", "training.keep=4", "training.save_every=1"), tmp_path / "run")
    for step in (3, 4):
        (run / "checkpoints" / f"step-0000000{step}" / "trainer.json").write_text("{}")
    last = run / "checkpoints" / "step-00000004"
    before = contents(last)
    quiet(tiny.recipe(pair, "training.steps=3", *settings), run, resume=True)
    assert steps_saved(run) == [2, 3, 4]
    assert contents(last) == before
    assert read_progress(run / "checkpoints" / "step-00000003").step == 3


# -- one process at a time


def test_a_second_process_is_refused(pair: Path, tmp_path: Path) -> None:
    """While the first trains; and once that is killed, though its data worker is not, the way is free."""
    run = tmp_path / "run"
    settings = ["training.steps=5000", "training.save_every=1", "data.workers=1"]
    command = ["train", str(pair / "va_pi.yaml"), "--output", str(run), "--device", "cpu"]
    for setting in settings:
        command += ["--set", setting]
    process = subprocess.Popen(
        [sys.executable, "-m", "varpi", *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and not checkpoints(run):
            time.sleep(0.02)
        with pytest.raises(VarpiError, match=f"^{run}: another process is at work there; wait for it, stop it, or"):
            quiet(tiny.recipe(pair, *settings), run, resume=True)
        with pytest.raises(VarpiError, match="already holds a run"):
            quiet(tiny.recipe(pair, *settings), run)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with RunLock(run) as lock:
        lock.take()  # at once


def test_two_that_begin_at_once(pair: Path, tmp_path: Path) -> None:
    """The one that comes second to the empty place is refused, before and after the first is through."""
    run = tmp_path / "run"
    with RunLock(run) as first:
        first.take()
        with pytest.raises(VarpiError, match="another process is at work there"):
            quiet(tiny.recipe(pair, "training.steps=1"), run)
    assert contents(run) == {".lock": b""}
    quiet(tiny.recipe(pair, "training.steps=1"), run)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunLock(tmp_path / "run") as lock:
        lock.take()
    assert "cannot be locked (OSError: [Errno 95] Operation not supported)" in caplog.text
