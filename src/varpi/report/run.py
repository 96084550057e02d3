"""The page of a training run: what was measured of it, samples from before and after, curves, costs and the recipe."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from varpi.data import BadImage, Dropped
from varpi.data.caption_check import checked
from varpi.data.classes import readable
from varpi.data.opening import open_batches, open_split
from varpi.errors import VarpiError
from varpi.evaluation.result import MARKER, read_result
from varpi.generators import Generator
from varpi.recipe import Recipe, parse_recipe, read_yaml
from varpi.report.examples import draw_samples, reconstructions
from varpi.report.page import Page, write_page
from varpi.report.pictures import PICTURE, SHARP, Reconstruction, before_after
from varpi.report.provenance import costs, environment
from varpi.report.results import NamedResult, tables_of_results
from varpi.report.tables import ResultTable
from varpi.runtime.processes import World
from varpi.sampling.settings import Sampling
from varpi.training import read_metrics
from varpi.weights.pair import Pair, open_generator, open_pair, open_tokenizer

KINDS_SHOWN = 8
"""Captions that a page shows samples of, and classes where there are more than ten."""


def report_run(
    run: Path,
    *,
    device: str,
    sampling: Sampling | None = None,
    classes: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    each: int | None = None,
    reconstructed: int | None = None,
    command: str = "",
    tell: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write RUN/report.html for a training run, and its samples as a picture, RUN/before-after.png; returns the page.

    sampling: by default free of guidance, with seed 0.
    classes, prompts: what to draw; by default all of up to ten classes, eight spread over more, or the first captions.
    each: images of each, before and after; none 4, of images beyond 64 pixels 1; 0 for no samples.
    reconstructed: images seen through base and tuned; none 8, of images beyond 64 pixels 2.
    command: what the page says it was made by. tell: hears what is under way.

    Raises VarpiError for a directory that is no run, and for classes and prompts that the generator does not know.
    """
    rows = read_metrics(run)
    recipe = parse_recipe(read_yaml(run / "recipe.yaml"), str(run / "recipe.yaml"))
    sampling = Sampling(seed=0) if sampling is None else sampling
    grids, seen, asked = [], [], None
    if recipe.generator is not None and recipe.tokenizer is not None and (run / "model.safetensors").is_file():
        pair = open_pair(run, device=device)
        small = pair.image_size <= SHARP
        each = (4 if small else 1) if each is None else each
        reconstructed = (8 if small else 2) if reconstructed is None else reconstructed
        condition: Any = None
        if each > 0:
            condition, asked = _asked(recipe, pair.generator, classes, prompts, each)
        before = None
        if recipe.generator.source is not None:
            before = open_generator(recipe, device), pair.tokenizer
            if recipe.method.trains == "tokenizer":
                before = before[0], open_tokenizer(recipe.tokenizer, device)
        for caption, parts in (("before", before), ("after", (pair.generator, pair.tokenizer))):
            if parts is not None and each > 0:
                tell(f"drawing {len(condition)} images of {pair.image_size} pixels, {caption}")
                grids.append(draw_samples(caption, *parts, condition, sampling, asked, progress=True))
        if before is not None and recipe.method.trains == "generator" and reconstructed > 0 and not recipe.data.stream:
            tell(f"reconstructing {reconstructed} images")
            try:
                seen = _reconstructions(recipe, before[0], pair, reconstructed)
            except VarpiError as error:  # the page of a run may be made where its data are not
                tell(f"no reconstructions: {error}")
    elif classes is not None or prompts is not None:
        raise VarpiError(f"{run}: has no generator and tokenizer to draw with, or no model yet; leave out what to draw")
    plain = asdict(Sampling(seed=0))
    how = ", ".join(f"{name.replace('_', ' ')} {v}" for name, v in asdict(sampling).items() if v != plain[name])
    page = Page(
        title=f"{recipe.method.name} · {run.name}",
        paragraph=f"{costs(run)['steps']} updates of {recipe.training.batch_size} images of {recipe.data.source} by "
        f"the method {recipe.method.name}. Samples are free-running, {how or 'without guidance'}, from the same seeds.",
        command=command or f"varpi report {run}",
        tables=_evaluations(run),
        samples=grids,
        reconstructions=seen,
        curves={run.name: rows},
        environment=environment(),
        recipe=recipe.to_yaml(),
        costs={run.name: costs(run)},
    )
    write_page(run / "report.html", page)
    if len(grids) == 2:
        before_after(run / PICTURE, *grids)
    return run / "report.html"


def _evaluations(run: Path) -> list[ResultTable]:
    """Tables of the results that lie in the run's directory, as `varpi evaluate --json` wrote them."""
    found = []
    for path in sorted(run.glob("*.json")):
        with path.open("rb") as file:
            if file.read(len(MARKER)) != MARKER:
                continue
        for table in tables_of_results([NamedResult(run.name, [read_result(path)])]):
            found.append(table._replace(title=f"{path.name}: {table.title}"))
    return found


def _asked(
    recipe: Recipe, generator: Generator, classes: Sequence[int] | None, prompts: Sequence[str] | None, each: int
) -> tuple[Any, list[str] | None]:
    """Conditions to sample, `each` of every kind, and what to call them where they are not class ids."""
    known = generator.num_classes
    if known is None and classes is not None:
        raise VarpiError("the generator is conditioned on text; ask for prompts instead of classes")
    if known is not None and prompts is not None:
        raise VarpiError("the generator is conditioned on classes; ask for classes instead of prompts")
    if known is not None:
        if classes is None:
            count = known if known <= 10 else KINDS_SHOWN
            classes = [i * known // count for i in range(count)]
        ids = generator.prepare_condition(list(classes)).cpu().repeat(each)
        if generator.class_names is None:
            return ids, None
        names = [*readable(generator.class_names), "no class"]
        return ids, [f"{names[i]} ({i})" for i in ids.tolist()]
    if prompts is not None:
        return [*prompts] * each, [*prompts] * each
    if recipe.data.stream:
        batches = open_batches(recipe, World(0, 1, "cpu"))
        batches.check_captions(generator.caption_check)
        captions: Any = next(batches.from_cursor(0)).condition[:KINDS_SHOWN]
        return captions * each, captions * each
    dataset: Any = checked(open_split(recipe.data, recipe.data.split), generator.caption_check)
    found = [(dataset[i].condition, dataset.caption(i)) for i in _usable(dataset, KINDS_SHOWN)]
    return [condition for condition, _ in found] * each, [caption for _, caption in found] * each


def _usable(dataset: Any, count: int) -> list[int]:
    """The first indices that hold an image and a condition."""
    found: list[int] = []
    for i in range(len(dataset)):
        with suppress(BadImage, Dropped):
            dataset[i]
            found.append(i)
        if len(found) == count:
            break
    return found


def _reconstructions(recipe: Recipe, base: Generator, pair: Pair, count: int) -> list[Reconstruction]:
    """Images of the validation split, or without one of the training split."""
    names = pair.class_names or open_split(recipe.data, recipe.data.split).class_names
    split = recipe.data.split if recipe.validation is None else recipe.validation.split
    dataset: Any = checked(open_split(recipe.data, split, names), pair.generator.caption_check)
    return reconstructions(base, pair.generator, pair.tokenizer, dataset, _usable(dataset, count))
