"""A page that compares models by the results that `varpi evaluate` wrote of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varpi.errors import VarpiError
from varpi.evaluation import Result, open_reference, read_result
from varpi.networks.extractors import FeatureExtractor
from varpi.report.embeddings import Embeddings
from varpi.report.page import Page, write_page
from varpi.report.pictures import SampleGrid, ScoredImages
from varpi.report.provenance import costs, environment
from varpi.report.results import NamedResult
from varpi.report.tables import ClassChanges
from varpi.samples.reading import SampleSet, open_samples
from varpi.training import read_metrics

SHOWN = 40
"""Images of each model that the page shows side by side."""
PER_IMAGE = ("clip_score", "hps_v2.1", "hps_v2.0")


def read_named(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """ "name=result.json" arguments by name; a name may come several times, once for each sampling seed."""
    named: dict[str, list[Path]] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not name.strip() or not path:
            raise VarpiError(f"{argument}: expected NAME=RESULT.json, a file that `varpi evaluate --json` wrote")
        named.setdefault(name.strip(), []).append(Path(path))
    return named


def report_comparison(
    output: Path,
    named: Mapping[str, Sequence[Path]],
    *,
    runs: Mapping[str, Path] | None = None,
    extractor: FeatureExtractor | None = None,
    embedded: int = 400,
    command: str,
) -> Path:
    """Write the page `output`: tables, the same samples side by side, changes by class, worst and best, curves, costs.

    named: result files of each model, the base first. runs: training runs, for their curves and costs.
    extractor: draws densities and a map of `embedded` images of the reference and of each model by its features.

    Raises VarpiError for results that do not compare, and as the parts of the page do.
    """
    results = {name: [read_result(path) for path in paths] for name, paths in named.items()}
    _check_kinds(results)
    runs = runs or {}
    page = Page(
        title=" against ".join(results),
        paragraph="What was measured, on which samples, against what and by what stands below each table. Samples "
        "stand side by side in the order in which they were made.",
        command=command,
        results=[NamedResult(name, found) for name, found in results.items()],
        samples=_grids(results),
        per_class=_changes(results),
        extremes=_extremes(results),
        embeddings=_embeddings(results, extractor, embedded) if extractor is not None else None,
        curves={name: read_metrics(run) for name, run in runs.items()},
        costs={name: costs(run) for name, run in runs.items()},
        environment=environment(),
    )
    write_page(output, page)
    return output


def _check_kinds(results: Mapping[str, Sequence[Result]]) -> None:
    """Refuse a model of which nothing was measured that was measured of the base."""
    kinds = {name: sorted({result.kind for result in found}) for name, found in results.items()}
    base = next(iter(kinds))
    for name, own in kinds.items():
        if not {*own} & {*kinds[base]}:
            raise VarpiError(
                f"{base} has results of kind {', '.join(kinds[base])} and {name} of kind {', '.join(own)}: they do not "
                "compare; evaluate both alike"
            )


def _samples(*results: Result) -> SampleSet | None:
    """The images behind the first of these results whose images still lie there."""
    sources = (result.samples.get("source") for result in results)
    return next((open_samples(source) for source in sources if source is not None and Path(source).exists()), None)


def _grids(results: Mapping[str, Sequence[Result]]) -> list[SampleGrid]:
    grids = []
    for name, found in results.items():
        if (samples := _samples(*found)) is None:
            continue
        first = next(iter(samples.batches([range(min(SHOWN, samples.count))]))).images
        images = first.permute(0, 2, 3, 1).numpy()
        grids.append(SampleGrid(name, images, _asked(samples)[: len(images)] or list(range(len(images)))))
    return grids


def _asked(samples: SampleSet) -> list[Any]:
    record = samples.sampling or {}
    return record.get("classes") or record.get("prompts") or []


def _changes(results: Mapping[str, Sequence[Result]]) -> list[ClassChanges]:
    """From the first model to the last, for every metric that both have by class."""
    if len(results) < 2:
        return []
    base, *_, tuned = map(_by_class, results.values())
    found = []
    for metric, before in base.items():
        after = tuned.get(metric, {})
        shared = {name: (before[name], after[name]) for name in before if name in after}
        if shared:
            found.append(ClassChanges(metric, shared))
    return found


def _by_class(results: Sequence[Result]) -> dict[str, Mapping[str, float]]:
    """A model's metrics by class, each of the first result that has it."""
    found: dict[str, Mapping[str, float]] = {}
    for result in results:
        for metric, numbers in result.details.items():
            if metric in result.metrics and isinstance(numbers, Mapping):
                found.setdefault(metric, numbers)
    return found


def _extremes(results: Mapping[str, Sequence[Result]]) -> list[ScoredImages]:
    """The worst and best samples by every score that is known image by image, of the first result that has it."""
    extremes: list[ScoredImages] = []
    for name, found in results.items():
        shown: set[str] = set()
        for result in found:
            scores = result.details.get("images", {}) if result.kind == "text" else {}
            new = [metric for metric in PER_IMAGE if metric in scores and metric not in shown]
            samples = _samples(result) if new else None
            if samples is None:
                continue
            images = np.concatenate([batch.images.permute(0, 2, 3, 1).numpy() for batch in _all(samples)])
            extremes += [ScoredImages(name, images, scores[metric], metric, _asked(samples)) for metric in new]
            shown.update(new)
    return extremes


def _all(samples: SampleSet, size: int = 256) -> Any:
    return samples.batches([range(i, min(i + size, samples.count)) for i in range(0, samples.count, size)])


def _embeddings(results: Mapping[str, Sequence[Result]], extractor: FeatureExtractor, count: int) -> Embeddings:
    def unfit(result: Result) -> bool:
        return result.kind != "distribution" or result.reference is None

    ordered = {name: sorted(found, key=unfit) for name, found in results.items()}
    first = next(iter(ordered.values()))[0]
    reference = first.reference
    if reference is None or unfit(first):
        raise VarpiError("embeddings need results that were measured against a reference of images")
    name, _, split = str(reference["source"]).removesuffix("]").partition("[")
    opened = open_reference(
        name,
        split=split or None,
        image_size=first.samples["image_size"][0],
        image_column=reference.get("image_column", "image"),
    )
    if opened.images is None:
        raise VarpiError(f"{name}: holds statistics and no images; embeddings need some")
    sets = {"real": opened.images} | {name: samples for name, found in ordered.items() if (samples := _samples(*found))}
    features = {}
    for label, samples in sets.items():
        shown = min(count, samples.count)
        places = [k * samples.count // shown for k in range(shown)]  # at even distances: many sets are sorted by class
        images = torch.cat([batch.images for batch in samples.batches([range(at, at + 1) for at in places])])
        features[label] = torch.cat([extractor(part)["pool"].cpu() for part in images.split(64)]).numpy()
    return Embeddings(features, extractor.name)
