"""What lies in examples/ does what it says; CITATION.cff is one."""

import csv
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from PIL import Image
from training_runs import numbers, quiet

import varpi
from varpi.cli.main import make_parser
from varpi.data import open_dataset
from varpi.methods.image_rewards import _function
from varpi.recipe import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"


def commands(name: str) -> list[list[str]]:
    """The arguments of each `varpi` in a file."""
    text = (EXAMPLES / name).read_text().replace("\\\n", " ")
    return [shlex.split(found) for found in re.findall(r"(?:^| )(?:-m )?varpi (train [^\n…]*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("name", ["own_reward.py", "own_data.py", "train.slurm"])
def test_its_command_is_understood(name: str) -> None:
    (command,) = commands(name)
    options = make_parser().parse_args(command)
    assert load_recipe(options.recipe, options.settings).training.steps


def test_own_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the path in its own command, and worked out by hand."""
    monkeypatch.syspath_prepend(EXAMPLES)
    options = make_parser().parse_args(commands("own_reward.py")[0])
    terms = load_recipe(options.recipe, options.settings).method.model_dump()["rewards"]
    assert terms["classifier"] is None
    reward = _function(terms["function"]["path"])
    images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images[1, :, 0] = 255  # a quarter is white: the best there is
    images[2] = 255
    assert reward(images, torch.tensor([0, 1, 2])).tolist() == [-0.0625, 0.0, -0.5625]


def test_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "caption"])
        for i in range(12):
            Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
            table.writerow([f"{i}.png", f"a square, number {i}"])
    monkeypatch.setattr(sys, "argv", ["own_data.py", str(tmp_path / "captions.csv"), str(tmp_path / "mine")])
    runpy.run_path(str(EXAMPLES / "own_data.py"), run_name="__main__")
    captions = {
        split: [open_dataset(tmp_path / "mine", image_size=16, split=split)[i].condition for i in range(count)]
        for split, count in (("train", 10), ("validation", 2))
    }
    numbers = {split: [int(str(caption).split()[-1]) for caption in found] for split, found in captions.items()}
    assert numbers == {"train": [1, 2, 3, 4, 5, 6, 7, 8, 9, 11], "validation": [0, 10]}


def test_the_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, shorter: three steps, and a hundred samples."""
    notebook = json.loads((EXAMPLES / "demo.ipynb").read_text())
    text = "".join("".join(cell["source"]) + "\n\n" for cell in notebook["cells"] if cell["cell_type"] == "code")
    for long, short in (("training.steps=60", "training.steps=3"), (".repeat(50)", ".repeat(10)")):
        assert long in text
        text = text.replace(long, short)
    said: list[str] = []
    found: dict[str, Any] = {"print": lambda *values: said.append(" ".join(map(str, values)))}
    exec(compile(text, "demo.ipynb", "exec"), found)
    assert "ratio before any update        1.0" in said
    assert [line.split()[0] for line in said[-2:]] == ["base", "tuned"]
    tuned, base = (dict(found[name].named_parameters()) for name in ("tuned", "generator"))
    assert any(not torch.equal(base[name], tuned[name]) for name in base)
    shown = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3


def test_the_script_for_slurm_is_one() -> None:
    assert subprocess.run(["bash", "-n", EXAMPLES / "train.slurm"]).returncode == 0


@pytest.mark.slow
def test_the_script_for_slurm_on_two_nodes(pair: Path, tmp_path: Path) -> None:
    """Two agents of torchrun that meet on this machine, two processes each, train; a second job finds it finished."""
    settings = ["training.steps=4", "generator.dropout=0", "optimizer.eps=1e-3"]
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, does in {
        "srun": 'for node in 1 2; do "$@" & done; wait -n && wait -n',
        "scontrol": 'echo "$@" >> scontrol.log; echo 127.0.0.1',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{does}\n")
        (tools / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (EXAMPLES / "train.slurm").read_text()
    for here, there in {
        "--nproc-per-node 8": "--nproc-per-node 2",
        ":29500": f":{port}",
        "llamagen-c2i-xxl --": f"{pair / 'va_pi.yaml'} --device cpu --",
        "--set data.source=/data/imagenet --set training.save_every=10": " ".join(f"--set {each}" for each in settings),
    }.items():
        assert script.count(here) == 1
        script = script.replace(here, there)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "OMP_NUM_THREADS": "1",
    }
    for _ in range(2):
        ran = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
    assert (tmp_path / "scontrol.log").read_text() == "show hostnames node[1-2]\n" * 2
    one = quiet(tiny.recipe(pair, *settings), tmp_path / "one")
    assert [row["loss"] for row in numbers(tmp_path / "runs/xxl")] == pytest.approx(
        [row["loss"] for row in numbers(one)], rel=1e-5
    )


def test_the_dockerfile_copies_and_installs_what_is_there() -> None:
    text = (EXAMPLES / "Dockerfile").read_text()
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((EXAMPLES.parent / name).exists() for name in line.split())
    (extras,) = re.findall(r"'/varpi\[([\w,]+)\]'", text)
    assert {*extras.split(",")} <= {*project["optional-dependencies"]}
    (version,) = re.findall(r"^FROM python:(\d+\.\d+)-slim$", text, re.MULTILINE)
    assert project["requires-python"] == f">={version}"


def test_the_citation() -> None:
    cited = yaml.safe_load((EXAMPLES.parent / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version"} <= cited.keys()
    assert cited["version"] == varpi.__version__
    (paper,) = cited["references"]
    assert paper["url"].endswith("2512.19680")
    assert [author["family-names"] for author in paper["authors"]] == ["Liao", "He", "Xu", "Qu", "Li", "Wei", "Yao"]
