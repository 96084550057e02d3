"""What the pages of runs are made of: samples and reconstructions of models, costs, and the surroundings of a run."""

import math
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

import varpi
from varpi import objective
from varpi.data import BadImage, Dataset, Dropped
from varpi.data.opening import open_batches, open_split
from varpi.data.pixels import to_uint8
from varpi.errors import VarpiError
from varpi.recipe import Recipe, parse_recipe, read_yaml
from varpi.report import Reconstruction, RunReport, SampleGrid, write
from varpi.runtime.processes import World
from varpi.runtime.randomness import Stream, uniforms
from varpi.sampling.generate import generate
from varpi.training import read_metrics
from varpi.weights import load_generator
from varpi.weights.pair import give_text_encoder, open_generator, open_tokenizer

CAPTIONS = 8
"""Captions that a page shows samples of."""


@torch.inference_mode()
def decode(tokenizer: Any, tokens: Tensor, batch_size: int = 100) -> Tensor:
    """Tokens (B,N) to images (B,3,H,W), `batch_size` at a time."""
    return torch.cat([tokenizer.decode(part) for part in tokens.split(batch_size)])


def sample_grid(
    caption: str, generator: Any, tokenizer: Any, condition: Any, seed: int, asked: Sequence[str] | None = None
) -> SampleGrid:
    """Free-running samples, one per class id or caption; the same seed gives the same random numbers to every model.

    asked: what to call the conditions, where these are not class ids.
    """
    tokens = generate(generator, condition, seed=seed)
    return SampleGrid(caption, to_uint8(decode(tokenizer, tokens)), condition.tolist() if asked is None else asked)


@torch.inference_mode()
def reconstructions(
    base: Any, tuned: Any, tokenizer: Any, dataset: Dataset, indices: Sequence[int]
) -> list[Reconstruction]:
    """Held-out images through the tokenizer, and sampled by both models under teacher forcing from the same numbers."""
    items = [dataset[index] for index in indices]
    device = next(iter(tokenizer.parameters())).device
    images = torch.stack([item.image for item in items]).to(device)
    tokens = tokenizer.encode(images)
    condition = base.prepare_condition([item.condition for item in items])
    draws = uniforms(0, 0, range(len(items)), (1, tokens.shape[1]), stream=Stream.REPORT_SAMPLES, device=str(device))
    rows = [images, tokenizer.decode(tokens)]
    for generator in (base, tuned):
        samples = objective.sample_tokens(generator.eval().logits(tokens, condition), 1, uniforms=draws)
        rows.append(tokenizer.decode(samples[:, 0]))
    return [Reconstruction(*pictures) for pictures in zip(*(to_uint8(row) for row in rows), strict=True)]


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


def report_run(run: Path, *, per_condition: int, device: str) -> Path:
    """Write RUN/report.html for a training run; returns its path.

    With `per_condition` > 0, samples of the generator before and after, of ten classes or eight captions at most.
    """
    rows = read_metrics(run)
    recipe = parse_recipe(read_yaml(run / "recipe.yaml"), str(run / "recipe.yaml"))
    grids = []
    model = run / "model.safetensors"
    if per_condition > 0 and recipe.generator is not None and recipe.tokenizer is not None and model.is_file():
        tokenizer = open_tokenizer(recipe.tokenizer, device)
        tuned: Any = load_generator(model, device=device)
        if recipe.generator.text_encoder is not None:
            give_text_encoder(tuned, recipe.generator.text_encoder, device)
        condition, asked = _examples(recipe, tuned.num_classes, per_condition)
        if recipe.generator.source is not None:
            base = open_generator(recipe, device)
            grids.append(sample_grid("before", base, tokenizer, condition, 0, asked))
            del base
        grids.append(sample_grid("after", tuned, tokenizer, condition, 0, asked))
    page = RunReport(
        title=f"{recipe.method.name} · {run.name}",
        paragraph=f"{costs(run)['steps']} updates of {recipe.training.batch_size} images of {recipe.data.source} by "
        f"the method {recipe.method.name}. Samples are free-running, without guidance, from the same seeds.",
        command=f"varpi report {run}",
        samples=grids,
        curves={run.name: rows},
        environment=environment(),
        recipe=recipe.to_yaml(),
        costs={run.name: costs(run)},
    )
    write(run / "report.html", page)
    return run / "report.html"


def _examples(recipe: Recipe, num_classes: int | None, each: int) -> tuple[Any, list[str] | None]:
    """Conditions to sample, `each` of every kind, and what to call them where they are not class ids."""
    if num_classes is not None:
        return torch.arange(min(10, num_classes)).repeat(each), None
    if recipe.data.stream:
        captions: Any = next(open_batches(recipe, World(0, 1, "cpu")).from_cursor(0)).condition[:CAPTIONS]
        return captions * each, captions * each
    dataset: Any = open_split(recipe.data, recipe.data.split)
    found: list[tuple[Any, str]] = []
    for i in range(len(dataset)):
        with suppress(BadImage, Dropped):
            found.append((dataset[i].condition, dataset.caption(i)))
        if len(found) == CAPTIONS:
            break
    return [condition for condition, _ in found] * each, [caption for _, caption in found] * each
