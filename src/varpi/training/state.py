"""Checkpoints of a run: written aside, sealed, renamed, so that what is there is whole.

    RUN/checkpoints/step-00000100/    torch.distributed.checkpoint files, trainer.json, manifest.json

Every random draw of a run is a function of seed, step and position, so a checkpoint needs no random states.
"""

import copy
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from varpi.errors import VarpiError
from varpi.runtime.processes import World
from varpi.training.average import Average
from varpi.training.checkpoint_files import (
    PROGRESS,
    CheckpointPlanner,
    CheckpointReader,
    read_index,
    read_manifest,
    seal,
    sync,
    verify,
)
from varpi.training.sharding import local

TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)
"""A checkpoint holds what training changes; frozen weights come from their source again."""
NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})")
"""What the run's own checkpoints are called. Anything else beside them is the user's."""


@dataclass
class Progress:
    """Where a run stands, beside its weights and its optimizer."""

    step: int = 0
    """Optimizer updates done, skipped ones included."""
    skipped: int = 0
    """Updates skipped for a non-finite loss or gradient, in all."""
    skipped_in_a_row: int = 0
    images_opened: int = 0
    """Over all processes, unusable ones included."""
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Those that were replaced: by reason how many, and the first of them."""
    cursors: list[int] = field(default_factory=list)
    """Where each process's stream of data goes on."""
    best_loss: float | None = None
    """Lowest validation loss so far; minus the highest reward, where that says what is best."""
    best_step: int = 0
    validations_since_best: int = 0
    seconds: float = 0.0
    """Spent training, over all sessions."""


class CheckpointWriter:
    """Writes a run's checkpoints, and deletes all but the newest `keep` up to the one written.

    background: train on while a copy of the state, made in main memory, is written; one at a time. Closed at its end.
    """

    def __init__(self, run: Path, world: World, keep: int, *, background: bool = False) -> None:
        self._run, self._world, self._keep = run, world, keep
        self._folder = run / "checkpoints"
        self._thread = ThreadPoolExecutor(1) if background else None
        self._under_way: tuple[Path, Future[None]] | None = None
        # Exchanges of the thread and of training must not meet.
        self._group: Any = dist.new_group(backend="gloo") if background and world.size > 1 else None

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, average: Average | None = None
    ) -> None:
        """Write the checkpoint of `progress.step`, or have it written once the one before is.

        Raises VarpiError when it cannot be written, or is not worth keeping because a weight is not finite, or when the
        one before could not be written; the earlier checkpoints are then untouched.
        """
        self.finish()
        final = self._folder / f"step-{progress.step:08d}"

        def prepare() -> None:
            with _said():
                if not all(local(p).isfinite().all() for p in model.parameters() if p.requires_grad):
                    raise VarpiError(
                        "a weight is not finite: an update overflowed; start again with a lower learning rate"
                    )
                if self._world.is_main:
                    for stale in self._folder.glob(".writing-*"):  # of a process that was killed
                        shutil.rmtree(stale, ignore_errors=True)
                    _aside(final).mkdir(parents=True)

        def hold() -> None:
            with _said():
                weights, moments = get_state_dict(model, optimizer, options=TRAINABLE)
                held = {"model": weights, "optimizer": moments, **_average(average)}
                state.update(held if self._thread is None else _copied(held))

        state: dict[str, Any] = {}
        self._together(final, prepare)
        self._together(final, hold)
        if self._thread is None:
            self._together(final, lambda: self._write(final, state, progress))
        else:
            self._under_way = final, self._thread.submit(self._write, final, state, copy.deepcopy(progress))

    def finish(self) -> None:
        """Wait for what is being written; raises VarpiError as `save` does."""
        if self._under_way is not None:
            (final, work), self._under_way = self._under_way, None
            self._together(final, work.result)

    def close(self) -> None:
        """Wait for what is being written, whatever comes of it."""
        if self._thread is not None:
            self._thread.shutdown()

    def _together(self, final: Path, work: Callable[[], None]) -> None:
        try:
            self._world.together(work)
        except VarpiError as error:
            if self._world.is_main:
                shutil.rmtree(_aside(final), ignore_errors=True)
            raise VarpiError(
                f"{final}: the checkpoint could not be written ({error}); {newest_kept(self._run)}"
            ) from error

    def _write(self, final: Path, state: dict[str, Any], progress: Progress) -> None:
        with _said():
            aside, alone = _aside(final), self._world.size == 1
            save(state, checkpoint_id=aside, no_dist=alone, process_group=self._group)
            if self._world.is_main:  # by now all have written their part
                (aside / PROGRESS).write_text(json.dumps(asdict(progress)))
                seal(aside)
                shutil.rmtree(final, ignore_errors=True)
                os.replace(aside, final)
                sync(self._folder)
                # Newer ones can only be damaged ones, which a resume passed over; they neither count nor go.
                for old in [path for path in checkpoints(self._run) if _step(path) <= progress.step][self._keep :]:
                    shutil.rmtree(old, ignore_errors=True)


def _copied(value: Any) -> Any:
    """With a copy of each tensor in main memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


def _aside(final: Path) -> Path:
    return final.with_name(f".writing-{final.name}")


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    own = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(own, key=_step, reverse=True)


def newest_whole(run: Path, warn: Callable[[str], object]) -> Path | None:
    """The newest checkpoint whose files are what was written; damaged ones are passed over with a warning.

    Raises VarpiError when there are checkpoints and none is whole.
    """
    problems = []
    for path in checkpoints(run):
        try:
            for name in read_manifest(path):
                verify(path, name)
            read_index(path)
            read_progress(path)
        except VarpiError as error:
            problems.append(str(error))
            warn(f"{error}; trying an older checkpoint")
        else:
            return path
    if problems:
        raise VarpiError(f"{run}: no checkpoint is whole: {problems[0]}")
    return None


def newest_kept(run: Path) -> str:
    """What an error says of where a run can be taken up again."""
    last = checkpoints(run)
    return f"the newest checkpoint is {last[0].name}" if last else "there is no checkpoint yet"


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood; raises VarpiError when that file is damaged or tells of another step."""
    verify(checkpoint, PROGRESS)
    try:
        progress = TypeAdapter(Progress).validate_json((checkpoint / PROGRESS).read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, (*first["loc"], first["msg"])))
        raise VarpiError(f"{checkpoint / PROGRESS}: does not say where a run stands ({what})") from error
    if progress.step != _step(checkpoint):
        raise VarpiError(f"{checkpoint / PROGRESS}: is of step {progress.step}")
    return progress


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, average: Average | None = None
) -> Progress:
    """Restore model, optimizer and average in place, under any number of processes; returns the progress.

    Raises VarpiError when it does not fit.
    """
    weights, moments = get_state_dict(model, optimizer, options=TRAINABLE)
    state = {"model": weights, "optimizer": moments, **_average(average)}
    try:
        with _without_warning():
            load(
                state,
                storage_reader=CheckpointReader(path),
                planner=CheckpointPlanner(),
                no_dist=world.size == 1,
            )
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=TRAINABLE)
    except (Exception, CheckpointException) as error:
        raise VarpiError(f"{path}: cannot be loaded into this model ({_reason(error)})") from error
    return read_progress(path)


def full_weights(model: nn.Module) -> dict[str, Any]:
    """The whole state dict on the CPU, complete on the main process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _average(average: Average | None) -> dict[str, Any]:
    return {} if average is None else {"average": average.weights}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


@contextmanager
def _said() -> Iterator[None]:
    """Whatever goes wrong, as one line."""
    try:
        with _without_warning():
            yield
    except VarpiError:
        raise
    except (Exception, CheckpointException) as error:  # torch derives its own from BaseException
        raise VarpiError(_reason(error)) from error


@contextmanager
def _without_warning() -> Iterator[None]:
    """Torch warns that a single process saves alone, which is what `no_dist` just told it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
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
