"""One run, or several compared, as one HTML page: what was done, what it changed, how it was measured.

The page needs nothing but the file itself.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from varpi.report.curves import curve_panels
from varpi.report.drawing import legend
from varpi.report.figures import embedding_density, embedding_map
from varpi.report.metrics import METRICS, Metric
from varpi.report.pictures import Reconstruction, SampleGrid, ScoredImages, extremes, sample_grid, strips
from varpi.report.results import NamedResult, tables_of_results
from varpi.report.tables import ClassChanges, TableRow, class_changes, mean_and_std, table
from varpi.runtime.files import write_text

__all__ = [
    "METRICS",
    "ClassChanges",
    "Embeddings",
    "Metric",
    "NamedResult",
    "Reconstruction",
    "RunReport",
    "SampleGrid",
    "ScoredImages",
    "TableRow",
    "mean_and_std",
    "render",
    "write",
]


class Embeddings(NamedTuple):
    """Features of sets of images: {name: (N,D)}, two to six sets, real images first; and whose features they are."""

    sets: Mapping[str, np.ndarray]
    features: str


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
    results: Sequence[NamedResult] = ()
    """Results of evaluations, compared: base, tuned and baselines, with the settings behind their numbers."""
    samples: Sequence[SampleGrid] = ()
    """Sample grids that stand side by side, from the same seeds."""
    reconstructions: Sequence[Reconstruction] = ()
    curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """Run name -> one metrics record per logged step; `step` is the x axis, `curves.PANELS` says what is drawn."""
    environment: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    """The recipe as YAML text."""
    costs: Mapping[str, Mapping[str, str | float]] = field(default_factory=dict)
    """Run name -> {column: value}: time, memory, images, FLOPs and whatever else the run cost."""
    per_class: Sequence[ClassChanges] = ()
    extremes: Sequence[ScoredImages] = ()
    embeddings: Embeddings | None = None
    """Drawn as densities and as a map, which needs scikit-learn."""


def render(report: RunReport) -> str:
    """The page as a string of HTML. All text is escaped; no address outside the page is ever asked for.

    Raises VarpiError for an unknown metric, a value that is not finite, results that cannot be compared, or images and
    embeddings of the wrong shape.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tables = [table(report.table)] if report.table else []
    tables += tables_of_results(report.results)
    explained = [
        [metric for metric in one.columns if all(metric not in earlier.columns for earlier in tables[:i])]
        for i, one in enumerate(tables)
    ]
    sets = report.embeddings.sets if report.embeddings is not None else {}
    return environment.get_template("page.html").render(
        report=report,
        tables=list(zip(tables, explained, strict=True)),
        grids=[sample_grid(grid) for grid in report.samples],
        strips=strips(report.reconstructions),
        extremes=[extremes(scored) for scored in report.extremes],
        classes=[class_changes(changes) for changes in report.per_class],
        embedding_panels=[embedding_density(sets), embedding_map(sets)] if sets else [],
        embedding_legend=legend(sets),
        panels=curve_panels(report.curves),
        legend=legend(report.curves),
        cost_columns=list(dict.fromkeys(name for cost in report.costs.values() for name in cost)),
        cost=_cost,
    )


def write(path: str | os.PathLike[str], report: RunReport) -> None:
    """Render the page into the file `path`, written aside and renamed.

    Raises VarpiError as `render` does, and when the file cannot be written, which leaves an older one untouched.
    """
    write_text(path, render(report))


def _cost(value: str | float) -> str:
    """A cost as read in a table: integers whole, powers of ten from 10^9 on, other numbers to three digits, text as it
    is."""
    if isinstance(value, str):
        return value
    if abs(value) >= 1e9:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.3g}"
