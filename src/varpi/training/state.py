"""Checkpoints of a run: written aside, verified, renamed, so that what is there is whole.

    RUN/checkpoints/step-00000100/    torch.distributed.checkpoint files, trainer.json, manifest.json

Every random draw of a run is a function of seed, step and position, so a checkpoint needs no random states.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from varpi.errors import VarpiError
from varpi.runtime.files import write_text
from varpi.runtime.processes import World

TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)
"""A checkpoint holds what training changes; frozen weights come from their source again."""


@dataclass
class Progress:
    """Where a run stands, beside its weights and its optimizer."""

    step: int = 0
    """Optimizer updates done, skipped ones included."""
    skipped: int = 0
    """Updates skipped for a non-finite loss or gradient, in all."""
    skipped_in_a_row: int = 0
    bad_images: int = 0
    """Unreadable images replaced so far, over all processes."""
    dropped_images: int = 0
    """Images left out on purpose so far, for want of a caption or of pixels."""
    images_opened: int = 0
    cursors: list[int] = field(default_factory=list)
    """Where each process's stream of data goes on."""
    best_loss: float | None = None
    """Lowest validation loss so far."""
    best_step: int = 0
    validations_since_best: int = 0
    seconds: float = 0.0
    """Spent training, over all sessions."""


def save_checkpoint(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, world: World, keep: int
) -> Path:
    """Write the checkpoint of `progress.step` and delete all but the newest `keep`.

    Raises VarpiError when it cannot be written; the earlier checkpoints are then untouched.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{progress.step:08d}"
    aside = folder / f".writing-{final.name}"

    def prepare() -> None:
        if world.is_main:
            for stale in folder.glob(".writing-*"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            aside.mkdir(parents=True)

    def write() -> None:
        weights, moments = get_state_dict(model, optimizer, options=TRAINABLE)
        with _without_warning():
            save({"model": weights, "optimizer": moments}, checkpoint_id=aside, no_dist=world.size == 1)
        if world.is_main:
            (aside / "trainer.json").write_text(json.dumps(asdict(progress)))
            _seal(aside)
            _verify(aside)

    try:
        _together(world, prepare)
        _together(world, write)
    except VarpiError as error:
        if world.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise VarpiError(f"{final}: the checkpoint could not be written ({error}); {_kept(run)}") from error
    if world.is_main:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _sync(folder)
        for old in checkpoints(run)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return final


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def newest_whole(run: Path, warn: Any) -> Path | None:
    """The newest checkpoint whose files are what was written; damaged ones are passed over with a warning.

    Raises VarpiError when there are checkpoints and none is whole.
    """
    problems = []
    for path in checkpoints(run):
        try:
            _verify(path)
        except VarpiError as error:
            problems.append(str(error))
            warn(f"{error}; trying an older checkpoint")
        else:
            return path
    if problems:
        raise VarpiError(f"{run}: no checkpoint is whole: {problems[0]}")
    return None


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> Progress:
    """Restore model and optimizer in place, under any number of processes; returns the progress."""
    weights, moments = get_state_dict(model, optimizer, options=TRAINABLE)
    try:
        with _without_warning():
            load({"model": weights, "optimizer": moments}, checkpoint_id=path, no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:
        raise VarpiError(f"{path}: cannot be loaded into this model ({_reason(error)})") from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=TRAINABLE)
    return Progress(**json.loads((path / "trainer.json").read_text()))


def full_weights(model: nn.Module) -> dict[str, Any]:
    """The whole state dict on the CPU, complete on the main process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _together(world: World, work: Callable[[], None]) -> None:
    """Work on every process; a failure on one fails all, so that none waits for it for ever."""
    error: BaseException | None = None
    try:
        work()
    except (Exception, CheckpointException) as problem:  # torch derives its own from BaseException
        error = problem
    if world.max(float(error is not None)):
        raise VarpiError(_reason(error)) from error


@contextmanager
def _without_warning() -> Iterator[None]:
    """Torch warns that a single process saves alone, which is what `no_dist` just told it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _seal(folder: Path) -> None:
    """Flush every file to disk and record its size and digest."""
    manifest = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    write_text(folder / "manifest.json", json.dumps(manifest))
    _sync(folder)


def _verify(folder: Path) -> None:
    """Check every file against the manifest, and that torch can read the index."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != expected["sha256"]:
                raise VarpiError(f"{folder / name} is damaged: its contents are not what was written")
        FileSystemReader(folder).read_metadata()
    except VarpiError:
        raise
    except Exception as error:
        raise VarpiError(f"{folder} is not a whole checkpoint ({_reason(error)})") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException | None) -> str:
    if error is None:
        return "another process failed"
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]  # what happened, without torch's tracebacks
    cause: BaseException | None = error
    while cause is not None:  # torch's file writer buries it
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the disk"
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split()) or type(error).__name__
    if "inline_container" in text:  # from another process, without its cause
        return "a file was cut short; is there space left on the disk?"
    return text if len(text) < 300 else f"{text[:300]}…"


def _kept(run: Path) -> str:
    last = checkpoints(run)
    return f"the last whole one is {last[0].name}" if last else "there is no earlier one"
