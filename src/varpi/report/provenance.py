"""Where numbers come from: what a run took, and the software and machine around it."""

import math
import platform
from pathlib import Path

import torch
from safetensors import safe_open

import varpi
from varpi.errors import VarpiError
from varpi.recipe import parse_recipe, read_yaml
from varpi.training import read_metrics


def costs(run: Path) -> dict[str, str | float]:
    """What a run took, from its log."""
    rows = [row for row in read_metrics(run) if "loss" in row]
    if not rows:
        raise VarpiError(f"{run}: its log holds no training step")
    recipe = parse_recipe(read_yaml(run / "recipe.yaml"), str(run / "recipe.yaml"))
    images = len(rows) * recipe.training.batch_size // recipe.training.updates_per_batch
    model, work = run / "model.safetensors", {}
    if "tokens_per_second" in rows[0] and model.is_file():
        tokens = round(rows[0]["tokens_per_second"] * rows[0]["seconds"])
        with safe_open(model, framework="pt") as file:
            weights = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        # Two operations a weight and token forward, four backward (Kaplan et al. 2020); attention scores left out
        work = {"transformer, FLOPs": 6.0 * weights * tokens * len(rows)}
    return {
        "steps": len(rows),
        "images": images,
        **work,
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 2),
        "seconds per step": round(sum(row["seconds"] for row in rows) / len(rows), 3),
        "peak memory, GiB": round(max(row["peak_memory_gib"] for row in rows), 2),
        "updates skipped": int(rows[-1]["skipped"]),
    }


def environment() -> dict[str, str]:
    return {
        "varpi": varpi.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }
