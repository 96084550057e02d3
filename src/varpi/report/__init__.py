"""One run as one HTML page: what was done, what it changed, how it was measured. Needs nothing but the file itself.

Shapes: n images of H x W pixels, uint8 (n,H,W,3).
"""

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from varpi.errors import VarpiError
from varpi.files import write_text
from varpi.report.curves import curve_panels, legend


class Metric(NamedTuple):
    """How a column of the results table is read."""

    label: str
    lower_is_better: bool
    meaning: str


METRICS = {
    "frechet_distance": Metric(
        "Fréchet distance",
        True,
        "How far the distribution of the samples' features lies from that of real images, both taken as Gaussian. "
        "Zero when mean and covariance coincide.",
    ),
    "precision": Metric(
        "Precision",
        False,
        "Fidelity: the share of samples that fall among real images, that is, no farther from one than its "
        "third-nearest real neighbour.",
    ),
    "recall": Metric(
        "Recall",
        False,
        "Diversity: the share of real images that fall among the samples by the same rule. It drops when a model "
        "keeps to few kinds of image.",
    ),
    "class_agreement": Metric(
        "Class agreement",
        False,
        "The share of samples in which a separately trained classifier sees the class that was asked for.",
    ),
    "inception_score": Metric(
        "Inception score",
        False,
        "How sure the classifier is of each sample and how evenly the samples spread over its classes. "
        "Between 1 and the number of classes.",
    ),
}


class TableRow(NamedTuple):
    """One line of the results: {metric: [mean, std]} with the keys of `METRICS`, and a note on how it was made."""

    name: str
    metrics: Mapping[str, Sequence[float]]
    note: str = ""


class SampleGrid(NamedTuple):
    """Samples of one model: uint8 images (n,H,W,3) and what was asked of each (n,), a class id or a prompt."""

    caption: str
    images: np.ndarray
    asked: Sequence[int] | Sequence[str]


class Reconstruction(NamedTuple):
    """One image seen four ways, each uint8 (H,W,3): itself, through the tokenizer, and as base and tuned predict it
    token by token with the true tokens before (teacher forcing)."""

    original: np.ndarray
    tokenizer: np.ndarray
    base: np.ndarray
    tuned: np.ndarray


@dataclass
class RunReport:
    """What a page shows; a part left empty is left out of the page."""

    title: str
    paragraph: str
    """What was done, in one paragraph."""
    command: str
    """The exact command that makes this page again."""
    table: Sequence[TableRow] = ()
    """Results, before and after; columns come in the order of `METRICS`."""
    samples: Sequence[SampleGrid] = ()
    """Sample grids that stand side by side, from the same seeds."""
    reconstructions: Sequence[Reconstruction] = ()
    curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """Run name -> one metrics record per logged step; `step` is the x axis, `curves.PANELS` says what is drawn."""
    environment: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    """The recipe as YAML text."""
    costs: Mapping[str, Mapping[str, str | float]] = field(default_factory=dict)
    """Run name -> {column: value}: time, memory and whatever else the run cost."""


def render(report: RunReport) -> str:
    """The page as a string of HTML. All text is escaped; no address outside the page is ever asked for.

    Raises VarpiError for an unknown metric, a value that is not a finite [mean, std], or images of the wrong shape.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = _columns(report.table)
    return environment.get_template("page.html").render(
        report=report,
        columns={name: METRICS[name] for name in columns},
        rows=_rows(report.table, columns),
        grids=[_grid(grid) for grid in report.samples],
        strips=_strips(report.reconstructions),
        panels=curve_panels(report.curves),
        legend=legend(report.curves),
        cost_columns=list(dict.fromkeys(name for cost in report.costs.values() for name in cost)),
        number=_number,
    )


def write(path: str | os.PathLike[str], report: RunReport) -> None:
    """Render the page into the file `path`, written aside and renamed.

    Raises VarpiError as `render` does, and when the file cannot be written, which leaves an older one untouched.
    """
    write_text(path, render(report))


def _columns(table: Sequence[TableRow]) -> list[str]:
    for row in table:
        for name, value in row.metrics.items():
            if name not in METRICS:
                raise VarpiError(f"report: {row.name} has an unknown metric {name}; known are {', '.join(METRICS)}")
            if len(value) != 2 or not all(math.isfinite(number) for number in value):
                raise VarpiError(f"report: {name} of {row.name} is {value}; it must be a finite [mean, std]")
    return [name for name in METRICS if any(name in row.metrics for row in table)]


def _rows(table: Sequence[TableRow], columns: Iterable[str]) -> list[dict]:
    best = {}
    for name in columns:
        means = [row.metrics[name][0] for row in table if name in row.metrics]
        best[name] = min(means) if METRICS[name].lower_is_better else max(means)
    return [
        {
            "name": row.name,
            "note": row.note,
            "cells": [
                (*mean_and_std(*row.metrics[name]), row.metrics[name][0] == best[name]) if name in row.metrics else None
                for name in columns
            ],
        }
        for row in table
    ]


def mean_and_std(mean: float, std: float) -> tuple[str, str]:
    """Both numbers to the digits that the spread supports: one of the std (two when it starts with 1).

    (0.81234, 0.0043) -> ("0.812", "0.004"); (17.42, 1.26) -> ("17.4", "1.3").
    """
    if std == 0:
        return f"{mean:.4g}", "0"
    exponent = math.floor(math.log10(std))
    digits = -exponent + (std / 10**exponent < 1.95)
    decimals = min(max(digits, 0), 6)
    return f"{mean:.{decimals}f}", f"{std:.{decimals}f}"


def _number(value: str | float) -> str:
    """A cost as read in a table: integers whole, other numbers to three digits, text as it is."""
    if isinstance(value, str):
        return value
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.3g}"


def _grid(grid: SampleGrid) -> dict:
    images = _checked(grid.images, f"the samples of {grid.caption}")
    asked = np.asarray(grid.asked)
    if asked.shape != (len(images),):
        raise VarpiError(f"report: the samples of {grid.caption}: {len(images)} images, {len(asked)} conditions")
    kinds, counts = np.unique(asked, return_counts=True)
    alt = f"{grid.caption}: {len(images)} generated images"
    if not (1 < len(kinds) <= 12 and (counts == counts[0]).all()):
        image = _mosaic(images, math.ceil(math.sqrt(len(images))))
        return {"caption": grid.caption, "alt": alt, "image": image, "heads": [], "prompts": []}
    order = np.argsort(asked, kind="stable").reshape(len(kinds), -1).T.reshape(-1)
    prompts = kinds.tolist() if kinds.dtype.kind == "U" else []
    heads = list(range(1, len(kinds) + 1)) if prompts else kinds.tolist()
    alt += f", one {'prompt' if prompts else 'class'} a column: {', '.join(map(str, kinds))}"
    image = _mosaic(images[order], len(kinds))
    return {"caption": grid.caption, "alt": alt, "image": image, "heads": heads, "prompts": prompts}


def _strips(reconstructions: Sequence[Reconstruction]) -> list[dict]:
    labels = {
        "original": ("Original", "the image"),
        "tokenizer": ("Tokenizer", "encoded and decoded: the best any generator can do"),
        "base": ("Base", "sampled under teacher forcing"),
        "tuned": ("Tuned", "sampled under teacher forcing, after post-training"),
    }
    if not reconstructions:
        return []
    shapes = {np.shape(image) for reconstruction in reconstructions for image in reconstruction}
    if len(shapes) != 1:
        raise VarpiError(f"report: the reconstructions have images of different shapes: {sorted(shapes)}")
    strips = []
    for name, (label, note) in labels.items():
        images = _checked(np.stack([getattr(row, name) for row in reconstructions]), f"reconstructions, {name}")
        alt = f"{label}, {note}: {len(images)} images, each below the same image in the strip above"
        strips.append({"label": label, "note": note, "alt": alt, "image": _mosaic(images, len(images))})
    return strips


def _checked(images: np.ndarray, name: str) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or images.size == 0:
        raise VarpiError(f"report: {name}: expected uint8 of shape (n, H, W, 3), got {images.dtype} {images.shape}")
    return images


def _mosaic(images: np.ndarray, columns: int) -> Markup:
    """Images (n,H,W,3) row by row in one PNG with transparent gaps, as a data URI.

    Small images are enlarged here to whole multiples: a browser that scales 32 pixels to 45 either blurs them or makes
    some pixels wider than others, whereas shrinking a large mosaic shows even, sharp pixels.
    """
    count, height, width, _ = images.shape
    factor = max(1, round(128 / max(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width, gap = height * factor, width * factor, max(2, height * factor // 16)
    rows = math.ceil(count / columns)
    mosaic = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        mosaic[top : top + height, left : left + width, :3] = image
        mosaic[top : top + height, left : left + width, 3] = 255
    file = io.BytesIO()
    Image.fromarray(mosaic).save(file, format="png", optimize=True)
    return Markup("data:image/png;base64,") + base64.b64encode(file.getvalue()).decode("ascii")
