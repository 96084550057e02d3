"""The page of a training run: its curves, costs and recipe, and samples from before and after."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from varpi.data import BadImage, Dropped
from varpi.data.caption_check import checked
from varpi.data.opening import open_batches, open_split
from varpi.generators import Generator
from varpi.recipe import Recipe, parse_recipe, read_yaml
from varpi.report.examples import draw_samples
from varpi.report.page import Page, write_page
from varpi.report.provenance import costs, environment
from varpi.runtime.processes import World
from varpi.training import read_metrics
from varpi.weights.pair import open_generator, open_pair, open_tokenizer

CAPTIONS = 8
"""Captions that a page shows samples of."""


def report_run(run: Path, *, per_condition: int, device: str) -> Path:
    """Write RUN/report.html for a training run; returns its path.

    With `per_condition` > 0, samples from before and after, of ten classes or eight captions at most.
    """
    rows = read_metrics(run)
    recipe = parse_recipe(read_yaml(run / "recipe.yaml"), str(run / "recipe.yaml"))
    grids = []
    model = run / "model.safetensors"
    if per_condition > 0 and recipe.generator is not None and recipe.tokenizer is not None and model.is_file():
        pair = open_pair(run, device=device)
        condition, asked = _examples(recipe, pair.generator, per_condition)
        if recipe.generator.source is not None:
            base, tokenizer = open_generator(recipe, device), pair.tokenizer
            if recipe.method.trains == "tokenizer":
                tokenizer = open_tokenizer(recipe.tokenizer, device)
            grids.append(draw_samples("before", base, tokenizer, condition, 0, asked))
            del base, tokenizer
        grids.append(draw_samples("after", pair.generator, pair.tokenizer, condition, 0, asked))
    page = Page(
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
    write_page(run / "report.html", page)
    return run / "report.html"


def _examples(recipe: Recipe, generator: Generator, each: int) -> tuple[Any, list[str] | None]:
    """Conditions to sample, `each` of every kind, and what to call them where they are not class ids."""
    if generator.num_classes is not None:
        return torch.arange(min(10, generator.num_classes)).repeat(each), None
    if recipe.data.stream:
        batches = open_batches(recipe, World(0, 1, "cpu"))
        batches.check_captions(generator.caption_check)
        captions: Any = next(batches.from_cursor(0)).condition[:CAPTIONS]
        return captions * each, captions * each
    dataset: Any = checked(open_split(recipe.data, recipe.data.split), generator.caption_check)
    found: list[tuple[Any, str]] = []
    for i in range(len(dataset)):
        with suppress(BadImage, Dropped):
            found.append((dataset[i].condition, dataset.caption(i)))
        if len(found) == CAPTIONS:
            break
    return [condition for condition, _ in found] * each, [caption for _, caption in found] * each
