"""A run's directory: whose it is, what its run was made from, and that one run at a time writes to it.

RUN/    recipe.yaml, data.json, metrics.jsonl, checkpoints/, model.safetensors, a lock; previews/ where asked for
"""

import fcntl
import itertools
import json
import logging
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from safetensors import SafetensorError, safe_open

from varpi.errors import VarpiError
from varpi.recipe import Recipe, parse_recipe, read_yaml
from varpi.runtime.files import line, write_text
from varpi.training.state import Progress, checkpoints, read_progress

FREE_TO_CHANGE = {
    "data.workers",
    "data.max_bad_fraction",
    "training.save_every",
    "training.save_in_background",
    "training.keep",
    "training.max_skipped",
    "training.shard_over",
}
"""What a resumed run may do differently without being another run, and what recipes of one study may differ in unsaid:
no number of theirs depends on it."""


class InUse(VarpiError):
    """Another process is at work in a directory."""


_locks: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


class RunLock:
    """Keeps other processes out of a run's directory. The kernel holds it, so it ends with the process, however."""

    def __init__(self, run: Path) -> None:
        self._path = run / ".lock"
        self._descriptor: int | None = None
        _locks.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.let_go()

    def let_go(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def taken(self) -> bool:
        return self._descriptor is not None

    def take(self) -> None:
        """Lock the directory, which is made if need be, until the end of the `with` block.

        Raises InUse when another process has it.
        """
        if self.taken:
            return
        run = self._path.parent
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise VarpiError(f"{run}: cannot be written to ({line(error)}); choose another --output") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(
                f"{run}: another process is at work there; wait for it, stop it, or choose another directory"
            ) from None
        except OSError as error:  # a file system that has no locks
            logging.getLogger("varpi").warning(
                "%s: cannot be locked (%s); see that no other process writes there", run, line(error)
            )


def _let_go_of_all() -> None:
    for lock in _locks:
        lock.let_go()


# A lock ends when all copies of its file descriptor are closed, and workers that load data outlive a killed run.
os.register_at_fork(after_in_child=_let_go_of_all)


def check_run(run: Path, recipe: Recipe, resume: bool) -> None:
    """Raise VarpiError for a directory that holds something else, or a run that is not to be continued."""
    if run.exists() and not run.is_dir():
        raise VarpiError(f"{run} is a file; choose another --output")
    if not run.is_dir() or all(entry.name.startswith(".") for entry in run.iterdir()):
        return
    if not (run / "recipe.yaml").is_file():
        raise VarpiError(f"{run} is not empty and holds no run; choose another --output")
    if not resume:
        newest = checkpoints(run)
        state = f"at {newest[0].name}" if newest else "without a checkpoint"
        raise VarpiError(f"{run} already holds a run ({state}); continue it with --resume or choose another --output")
    before = _flatten(_complete(read_yaml(run / "recipe.yaml")))
    now = _flatten(yaml.safe_load(recipe.to_yaml()))
    scheduled = recipe.optimizer.schedule != "constant" or recipe.method.follows_steps
    free = FREE_TO_CHANGE if scheduled else FREE_TO_CHANGE | {"training.steps"}
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in free and not key.startswith(("logging.", "preview")):
            raise VarpiError(
                f"{run} is a run of another recipe: {key} is {before.get(key)!r} there and {now.get(key)!r} here; "
                "choose another --output"
            )


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of keys that are newer than the run; as it is where it is none of this varpi's recipes."""
    try:
        return yaml.safe_load(parse_recipe(values).to_yaml())
    except VarpiError:
        return values


def is_run(run: Path) -> bool:
    return (run / "recipe.yaml").is_file()


def is_finished(run: Path, recipe: Recipe) -> bool:
    """Whether there is nothing left to train and nothing left to write. Reads no weights."""
    for checkpoint in checkpoints(run)[:1]:
        try:
            progress = read_progress(checkpoint)
        except VarpiError:
            return False
        if not is_over(recipe, progress):
            return False
        if not keeps_best(recipe):
            return _step_of_model(run) == progress.step
        return progress.best_loss is None or _step_of_model(run) == progress.best_step
    return False


def keeps_best(recipe: Recipe) -> bool:
    """Whether a run gives back the best of its validated weights, not the last."""
    return recipe.validation is not None and recipe.validation.best_by is not None


def is_over(recipe: Recipe, progress: Progress) -> bool:
    """Whether all steps are done, or validation's patience is at its end."""
    patience = recipe.validation.patience if recipe.validation is not None else None
    return progress.step >= recipe.training.steps or (
        patience is not None and progress.validations_since_best >= patience
    )


def check_data(run: Path, fingerprint: str) -> None:
    """Raise VarpiError when a run is to be continued on other data."""
    path = run / "data.json"
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_bytes())["fingerprint"]
    except Exception as error:  # cut short, no JSON, too deep, no dictionary
        raise VarpiError(
            f"{path}: does not say what data the run was trained on ({line(error)}); if it is the same, delete the file"
        ) from error
    if before != fingerprint:
        raise VarpiError(f"{run} was trained on other data than the source now holds; choose another --output")


def write_origin(run: Path, recipe: Recipe, fingerprint: str) -> None:
    """Write down what the run is made from."""
    write_text(run / "recipe.yaml", recipe.to_yaml())
    write_text(run / "data.json", json.dumps({"fingerprint": fingerprint}))


def _step_of_model(run: Path) -> int | None:
    """The step that the weights file is of; None where there is none that says so."""
    try:
        with safe_open(run / "model.safetensors", framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    items = (_flatten(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items())
    return dict(itertools.chain.from_iterable(item.items() for item in items))
