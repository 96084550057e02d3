"""What a run says while it works: metrics.jsonl, a live display, and TensorBoard or W&B where asked for."""

import json
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from varpi.errors import VarpiError
from varpi.recipe import Logging
from varpi.runtime.files import write_text

Metrics = dict[str, float]


class Logger:
    """The main process's output. `start` is the step the run continues from; later lines of the log are dropped."""

    def __init__(self, run: Path, settings: Logging, steps: int, start: int, *, show: bool) -> None:
        self._steps = steps
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
            self.say(f"step {step}: validation loss {metrics['validation_loss']:.4f}")
        if "loss" not in metrics:
            return
        shown = [("reward", "reward_mean"), ("loss", "loss"), ("tokens/s", "tokens_per_second")]
        line = "  ".join(f"{label} {metrics[key]:.4g}" for label, key in shown if key in metrics)
        self._bar.update(self._task, completed=step, description=line)
        if self._plain and (step % max(1, self._steps // 20) == 0 or step == self._steps):
            print(f"step {step}/{self._steps}  {line}", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """A line for the person who watches."""
        if self._plain:
            print(message, file=sys.stderr, flush=True)
        else:
            self._bar.console.print(message, highlight=False, markup=False)


def peak_memory(device: str) -> float:
    """Largest memory held so far, in GiB: of the accelerator, or of this process when it runs on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that was cut short is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise VarpiError(f"{run}: no metrics.jsonl; this is not a run directory")
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _reopen(path: Path, start: int) -> Any:
    """Open for appending, keeping only what was logged up to step `start`."""
    if path.exists():
        kept = [row for row in read_metrics(path.parent) if row["step"] <= start]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return path.open("a")


class _TensorBoard:
    def __init__(self, run: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise VarpiError("logging.tensorboard needs: pip install 'varpi[tensorboard]'") from error
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: Path, project: str) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise VarpiError("logging.wandb needs: pip install 'varpi[wandb]'") from error
        self._run = wandb.init(project=project, name=run.name, dir=str(run), id=run.name, resume="allow")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()
