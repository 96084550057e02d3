"""What a run says as it begins and while it works."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from training_runs import quiet

from varpi.data.stream import StreamBatches
from varpi.runtime.processes import World
from varpi.training import train
from varpi.training.banner import banner
from varpi.training.logging import duration


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on stderr, from the banner on."""
    lines = capsys.readouterr().err.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("va_pi: ")) :]


def test_what_a_run_says(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    train(tiny.recipe(pair, "training.save_every=2"), run, device="cpu")
    lines = said(capsys)
    assert lines[:6] == [
        "va_pi: 6 steps of 8 images, fp32, on the CPU",
        "trains LlamaGen, 0.0228 million parameters",
        f"generator: {pair / 'generator.safetensors'}",
        f"tokenizer: {pair / 'tokenizer.safetensors'}",
        f"data: {pair / 'images'}, train, 24 images of 16 pixels, 3 classes",
        f"writes {run}: a checkpoint every 2 steps, metrics.jsonl, model.safetensors",
    ]
    line = r"step \d/6  reward \S+  loss \S+  tokens/s \S+  \(\w+ \d+%, \w+ \d+%, \w+ \d+%\)"
    assert all(re.fullmatch(rf"{line}  \d+ s left", step) for step in lines[6:11])
    assert re.fullmatch(line, lines[11])
    assert len(lines) == 12


def test_a_run_that_goes_on_says_from_where(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    quiet(tiny.recipe(pair, "training.steps=2"), run)
    assert "steps" not in capsys.readouterr().err
    train(tiny.recipe(pair, "training.steps=4"), run, resume=True, device="cpu")
    assert said(capsys)[6] == "resuming from step 2"


def test_adapters_and_streams(pair: Path, tmp_path: Path) -> None:
    model = type("FSDPLinear", (torch.nn.Linear,), {})(1000, 2000)  # as sharding renames it
    model.bias.requires_grad_(False)
    stream = object.__new__(StreamBatches)
    stream.num_classes = None
    method: Any = SimpleNamespace(model=model)
    recipe = tiny.recipe(pair, "generator.source=org/name")
    lines = banner(tmp_path, recipe, method, stream, World(1, 4, "cpu"), 0)
    assert lines[0] == "va_pi: 6 steps of 8 images, fp32, on 4 processes on the CPU"
    assert lines[1] == "trains Linear, 2 million of its 2 million parameters"
    assert lines[2] == "generator: org/name"
    assert lines[4] == f"data: {pair / 'images'}, train, a stream of 16 pixels, captions"
    assert lines[5].startswith(f"writes {tmp_path}: a checkpoint at the end")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
