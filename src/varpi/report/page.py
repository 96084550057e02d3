"""One HTML page of results: what was done, what it changed, how it was measured. It needs nothing but its own file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from varpi.report.curves import curve_panels
from varpi.report.drawing import legend
from varpi.report.embeddings import Embeddings, embedding_density, embedding_map
from varpi.report.pictures import Reconstruction, SampleGrid, ScoredImages, extremes, grid, strips
from varpi.report.results import NamedResult, tables_of_results
from varpi.report.tables import ClassChanges, ResultTable, TableRow, class_changes, table
from varpi.runtime.files import write_text


@dataclass
class Page:
    """What a page shows; a part left empty is left out of the page."""

    title: str
    paragraph: str
    """What was done, in one paragraph."""
    command: str
    """The exact command that makes this page again; empty where that is not known."""
    verdict: str = ""
    """What was found, in a sentence or two with its uncertainty."""
    table: Sequence[TableRow] = ()
    """Results, before and after; columns come in the order of `COLUMNS`."""
    results: Sequence[NamedResult] = ()
    """Results of evaluations, compared: base, tuned and baselines, with the settings behind their numbers."""
    tables: Sequence[ResultTable] = ()
    """Tables made beforehand, such as those of a study."""
    reading: str = ""
    """How to read the tables; none: what holds of sampling seeds."""
    chosen: Sequence[tuple[str, str]] = ()
    """What was tried on held-out data, and taken: (of what, in words)."""
    samples: Sequence[SampleGrid] = ()
    """Sample grids that stand side by side, from the same seeds."""
    reconstructions: Sequence[Reconstruction] = ()
    curves: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """Run name -> one metrics record per logged step; `step` is the x axis, `curves.PANELS` says what is drawn."""
    environment: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    """The recipe as YAML text."""
    recipe_title: str = "Recipe"
    costs: Mapping[str, Mapping[str, str | float]] = field(default_factory=dict)
    """Run name -> {column: value}: time, memory, images, FLOPs and whatever else the run cost."""
    per_class: Sequence[ClassChanges] = ()
    extremes: Sequence[ScoredImages] = ()
    embeddings: Embeddings | None = None
    """Drawn as densities and as a map, which needs scikit-learn."""


def render(page: Page) -> str:
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
    tables = [table(page.table)] if page.table else []
    tables += [*tables_of_results(page.results), *page.tables]
    explained = [
        [metric for metric in one.columns if all(metric not in earlier.columns for earlier in tables[:i])]
        for i, one in enumerate(tables)
    ]
    sets = page.embeddings.sets if page.embeddings is not None else {}
    return environment.get_template("page.html").render(
        page=page,
        tables=list(zip(tables, explained, strict=True)),
        grids=[grid(samples) for samples in page.samples],
        strips=strips(page.reconstructions),
        extremes=[extremes(scored) for scored in page.extremes],
        classes=[class_changes(changes) for changes in page.per_class],
        embedding_panels=[embedding_density(sets), embedding_map(sets)] if sets else [],
        embedding_legend=legend(sets),
        panels=curve_panels(page.curves),
        legend=legend(page.curves),
        cost_columns=list(dict.fromkeys(name for cost in page.costs.values() for name in cost)),
        cost=cost,
    )


def write_page(path: str | os.PathLike[str], page: Page) -> None:
    """Render the page into the file `path`, written aside and renamed.

    Raises VarpiError as `render` does, and when the file cannot be written, which leaves an older one untouched.
    """
    write_text(path, render(page))


def cost(value: str | float) -> str:
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
