"""What a run says while it works: metrics.jsonl, a live display, and TensorBoard or W&B where asked for."""

import importlib.util
import json
import logging
import resource
import secrets
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from varpi.errors import VarpiError, printable
from varpi.recipe import Logging
from varpi.runtime.files import line, write_text
from varpi.runtime.processes import World

Metrics = dict[str, float]


class Logger:
    """The main process's output. `start` is the step the run continues from; later lines of the log are dropped."""

    def __init__(self, run: Path, settings: Logging, steps: int, start: int, *, show: bool) -> None:
        self._show = show
        self._steps = steps
        self._start = start
        self._begun = time.perf_counter()
        self._stages: dict[str, float] = {}
        self._file = _reopen(run / "metrics.jsonl", start)
        self._sinks: list[Any] = []
        if settings.tensorboard:
            self._sinks.append(_TensorBoard(run, start))
        if settings.wandb is not None:
            self._sinks.append(_WandB(run, settings.wandb))
        self._console = Console(stderr=True)
        self._plain = show and not self._console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not show or self._plain,
        )
        self._task = self._bar.add_task("starting", total=steps, completed=start)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def log(self, step: int, metrics: Metrics) -> None:
        """One line of metrics.jsonl: {"step": step, **metrics}."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.log(step, metrics)
        if "validation_loss" in metrics:
            reward = f", reward {metrics['validation_reward']:.4f}" if "validation_reward" in metrics else ""
            self.say(f"step {step}: validation loss {metrics['validation_loss']:.4f}{reward}")
        if "loss" not in metrics:
            return
        shown = [("reward", "reward_mean"), ("loss", "loss"), ("tokens/s", "tokens_per_second")]
        told = "  ".join(f"{label} {metrics[key]:.4g}" for label, key in shown if key in metrics)
        told += self._shares(metrics)
        self._bar.update(self._task, completed=step, description=told)
        if self._plain and (step % max(1, self._steps // 20) == 0 or step == self._steps):
            per_step = (time.perf_counter() - self._begun) / (step - self._start)
            left = f"  {duration(per_step * (self._steps - step))} left" if step < self._steps else ""
            print(f"step {step}/{self._steps}  {told}{left}", file=sys.stderr, flush=True)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture, uint8 (H,W,3), for TensorBoard and W&B."""
        for sink in self._sinks:
            sink.picture(step, name, picture)

    def say(self, message: str) -> None:
        """A line for the person who watches."""
        if self._plain:
            print(printable(message), file=sys.stderr, flush=True)
        elif self._show:
            self._bar.console.print(printable(message), highlight=False, markup=False)

    def _shares(self, metrics: Metrics) -> str:
        """The stages that have taken most of the time so far."""
        for name, value in metrics.items():
            if name.startswith("seconds_"):
                stage = name.removeprefix("seconds_")
                self._stages[stage] = self._stages.get(stage, 0.0) + value
        total = sum(self._stages.values())
        most = sorted(self._stages, key=lambda name: -self._stages[name])[:3]
        said = ", ".join(f"{name} {self._stages[name] / total:.0%}" for name in most if total)
        return f"  ({said})" if said else ""


class Silence:
    """What the processes that are not the main one log to."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        pass

    def say(self, message: str) -> None:
        pass


def open_logger(run: Path, settings: Logging, steps: int, start: int, world: World, *, show: bool) -> Logger | Silence:
    """The logger of this process; see `Logger`."""
    return Logger(run, settings, steps, start, show=show) if world.is_main else Silence()


def duration(seconds: float) -> str:
    """As a person says it: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def peak_memory(device: str) -> float:
    """Largest memory held so far, in GiB: of the accelerator, or of this process when it runs on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; those that are damaged, or were cut short, are left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise VarpiError(f"{run}: no metrics.jsonl; this is not a run directory")
    return [row for row in _parse(path) if row is not None]


def _parse(path: Path) -> list[dict[str, Any] | None]:
    """What each line of a log says; None for one that says nothing."""
    return [_row(text) for text in path.read_bytes().splitlines()]


def _row(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _reopen(path: Path, start: int) -> Any:
    """Open for appending, keeping only what was logged up to step `start`; damaged lines are dropped with a warning."""
    if path.is_file():
        rows = _parse(path)
        damaged = [number for number, row in enumerate(rows[:-1], start=1) if row is None]  # the last may be cut short
        if damaged:
            logging.getLogger("varpi").warning(
                "%s: dropped %d damaged line(s), the first is line %d", path, len(damaged), damaged[0]
            )
        # A run that begins again says again how it stood before its first step
        kept = [row for row in rows if row is not None and row["step"] <= start and start]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    try:
        return path.open("a")
    except OSError as error:
        raise VarpiError(f"{path}: cannot be written to ({line(error)}); move it away") from error


def check_sinks(settings: Logging) -> None:
    """Raise VarpiError when TensorBoard or W&B is asked for and not installed."""
    for wanted, module in ((settings.tensorboard, "tensorboard"), (settings.wandb is not None, "wandb")):
        if wanted and importlib.util.find_spec(module) is None:
            raise VarpiError(f"logging.{module} needs: pip install 'varpi[{module}]'")


class _TensorBoard:
    def __init__(self, run: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Path, project: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        of_run = run / ".wandb-id"  # a run that is resumed goes on there; others may have its directory's name
        if not of_run.is_file():
            write_text(of_run, secrets.token_hex(8))
        name = of_run.read_text()
        self._run = wandb.init(project=project, name=run.name, dir=str(run), id=name, resume="allow")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run.log({name: wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()
