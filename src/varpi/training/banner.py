"""What a run says before it begins: what is trained, on what, where, and what will be written."""

from pathlib import Path

import torch

from varpi.data import Batches
from varpi.data.opening import AnyBatches
from varpi.methods import Method
from varpi.recipe import Recipe
from varpi.runtime.processes import World
from varpi.training.preview import PREVIEWS


def banner(run: Path, recipe: Recipe, method: Method, batches: AnyBatches, world: World, begun: int) -> list[str]:
    """Its lines. begun: the step that the run continues from."""
    training, data, parameters = recipe.training, recipe.data, list(method.model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    device = torch.cuda.get_device_name(world.device) if world.device.startswith("cuda") else "the CPU"
    several = f"{world.size} processes on " if world.size > 1 else ""
    lines = [
        f"{recipe.method.name}: {training.steps} steps of {training.batch_size} images, {training.precision}, on "
        f"{several}{device}",
        f"trains {type(method.model).__name__.removeprefix('FSDP')}, {_millions(learning)}"
        + (f" of its {_millions(count)}" if learning < count else "")
        + " parameters",
    ]
    for name in ("generator", "tokenizer"):
        section = getattr(recipe, name)
        if section is not None:
            lines.append(f"{name}: {section.source or 'fresh weights'}")
    size = f"{batches.size} images" if isinstance(batches, Batches) else "a stream"
    kinds = "captions" if batches.num_classes is None else f"{batches.num_classes} classes"
    lines.append(f"data: {data.source}, {data.split:.60}, {size} of {data.image_size} pixels, {kinds}")
    every = f"a checkpoint every {training.save_every} steps" if training.save_every else "a checkpoint at the end"
    lines.append(f"writes {run}: {every}, metrics.jsonl, model.safetensors")
    if recipe.preview is not None:
        lines.append(f"shows {recipe.preview.images} images every {recipe.preview.every} steps: {run / PREVIEWS}")
    return [*lines, f"resuming from step {begun}"] if begun else lines


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} million" if count < 1e9 else f"{count / 1e9:.3g} billion"
