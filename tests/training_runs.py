"""Carrying out recipes in tests, looking at what they wrote, and making them crash."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import TIMES
from torch import Tensor

from varpi.recipe import Recipe
from varpi.training import read_metrics, train
from varpi.training.logging import Logger


def quiet(recipe: Recipe, run: Path, *, resume: bool = False) -> Path:
    return train(recipe, run, resume=resume, device="cpu", show=False)


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def numbers(run: Path) -> list[dict[str, Any]]:
    """The log without what a clock said."""
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_metrics(run)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_saved(run: Path) -> list[int]:
    """The steps of all checkpoints; a half-written one is an error."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir())


class Crash(BaseException):
    """What no code handles."""


def crash(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, run: Path, step: int) -> None:
    """Let a run die right after it logged a step."""
    log = Logger.log

    def logged(self: Logger, number: int, metrics: dict[str, float]) -> None:
        log(self, number, metrics)
        if number == step and "loss" in metrics:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Logger, "log", logged)
        with pytest.raises(Crash):
            quiet(recipe, run)
