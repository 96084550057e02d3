"""Tables of the page: numbers by model, with their spread and the best marked, and changes by class."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from varpi.errors import VarpiError
from varpi.report.columns import COLUMNS, Column


class TableRow(NamedTuple):
    """One line of the results: {metric: [mean, std]}, or {metric: number} without a spread, with the keys of `COLUMNS`,
    and a note on how it was made."""

    name: str
    metrics: Mapping[str, Sequence[float] | float]
    note: str = ""
    of_interest: bool = False
    """Whether this is what the page is about: its line is marked, whatever its numbers."""


class ClassChanges(NamedTuple):
    """A metric by class, before and after: {class: (before, after)}. metric: a key of `COLUMNS`, not one nearest 0."""

    metric: str
    classes: Mapping[str, tuple[float, float]]
    most: int = 10
    """How many of the most improved, and of the most worsened, the page shows."""


class Cell(NamedTuple):
    """A number as read: its spread over seeds or its standard error over images, where there is one, and its rank."""

    value: str
    std: str
    error: str
    best: bool


class ResultTable(NamedTuple):
    """One table and what stands under it."""

    title: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    spread: bool
    """Whether some number has a spread over seeds."""
    single: bool
    """Whether some number has none."""
    errors: bool
    """Whether some number has a standard error over images."""
    notes: Sequence[tuple[str, Sequence[str]]]
    """What a reader of the numbers has to know: (what, lines)."""
    settings: Sequence[tuple[str, str]]
    """What the numbers depend on: (of what, settings)."""


def table(
    rows: Sequence[TableRow],
    title: str = "",
    errors: Mapping[str, Mapping[str, float]] | None = None,
    notes: Sequence[tuple[str, Sequence[str]]] = (),
    settings: Sequence[tuple[str, str]] = (),
    marked: Mapping[str, str] | None = None,
) -> ResultTable:
    """Rows under the columns that they need, in the order of `COLUMNS`.

    errors: standard errors over images of numbers without a spread, {row: {metric: error}}.
    marked: the row that is best in a metric, {metric: row}; None: that with the best number.

    Raises VarpiError for an unknown metric or a value that is not a finite number or a finite [mean, std].
    """
    for row in rows:
        for name, value in row.metrics.items():
            _check(row.name, name, value)
    names = [name for name in COLUMNS if any(name in row.metrics for row in rows)]
    best = {
        name: _best(name, [_mean_and_spread(row.metrics[name])[0] for row in rows if name in row.metrics])
        for name in names
    }

    def cell(row: TableRow, name: str) -> Cell | None:
        if name not in row.metrics:
            return None
        mean, std = _mean_and_spread(row.metrics[name])
        is_best = mean == best[name] if marked is None else marked.get(name) == row.name
        if std is not None:
            shown, digits = mean_and_std(mean, std)
            return Cell(_minus(shown), digits, "", is_best)
        error = (errors or {}).get(row.name, {}).get(name)
        if error is None:
            return Cell(number(mean), "", "", is_best)
        shown, digits = mean_and_std(mean, error)
        return Cell(_minus(shown), "", digits, is_best)

    cells = [
        {
            "name": row.name,
            "note": row.note,
            "of_interest": row.of_interest,
            "cells": [cell(row, name) for name in names],
        }
        for row in rows
    ]
    shown = [cell for row in cells for cell in row["cells"] if cell is not None]
    return ResultTable(
        title,
        [COLUMNS[name] for name in names],
        cells,
        spread=any(cell.std for cell in shown),
        single=any(not cell.std for cell in shown),
        errors=any(cell.error for cell in shown),
        notes=notes,
        settings=settings,
    )


def _check(row: str, name: str, value: Sequence[float] | float) -> None:
    if name not in COLUMNS:
        raise VarpiError(f"report: {row} has an unknown metric {name}; known are {', '.join(COLUMNS)}")
    try:
        finite = all(math.isfinite(part) for part in _mean_and_spread(value) if part is not None)
    except ValueError:
        finite = False
    if not finite:
        raise VarpiError(f"report: {name} of {row} is {value}; it must be a finite [mean, std] or a finite number")


def _mean_and_spread(value: Sequence[float] | float) -> tuple[float, float | None]:
    """[mean, std], or a number and no std. Raises ValueError for a list of another length or a std below 0."""
    if isinstance(value, Sequence):
        mean, std = value
        if std < 0:
            raise ValueError
        return float(mean), float(std)
    return float(value), None


def _best(name: str, means: Sequence[float]) -> float | None:
    """The best of several; a single number is the best of nothing."""
    if len(means) < 2:
        return None
    better = COLUMNS[name].better
    if better == "nearer 0":
        return min(means, key=abs)
    return min(means) if better == "lower" else max(means)


def class_changes(changes: ClassChanges) -> dict[str, Any]:
    """What the page needs to show changes by class: counts, and the classes that improved and worsened most.

    Up to 2 x `most` classes stand in one list. Raises VarpiError for an unknown metric, one without a better side, no
    class, or a value that is not finite.
    """
    metric = COLUMNS.get(changes.metric)
    if metric is None or metric.better == "nearer 0":
        known = ", ".join(name for name, metric in COLUMNS.items() if metric.better != "nearer 0")
        raise VarpiError(f"report: there are no changes by class of {changes.metric}; known are {known}")
    if not changes.classes or changes.most < 1:
        raise VarpiError(f"report: the changes of {changes.metric} by class need a class, and `most` of at least 1")
    for name, pair in changes.classes.items():
        if len(pair) != 2 or not all(map(math.isfinite, pair)):
            raise VarpiError(f"report: {changes.metric} of class {name} is {pair}; it must be finite (before, after)")
    sign = -1 if metric.better == "lower" else 1
    gains = sorted(
        ((sign * (after - before), str(name), before, after) for name, (before, after) in changes.classes.items()),
        key=lambda row: -row[0],
    )
    largest = max(abs(gain) for gain, *_ in gains) or 1.0
    rows = [
        {"name": name, "before": number(before, 3), "after": number(after, 3), "change": _signed(after - before),
         "bar": 100 * gain / largest}
        for gain, name, before, after in gains
    ]  # fmt: skip
    better = sum(row[0] > 0 for row in gains)
    worse = sum(row[0] < 0 for row in gains)
    if len(rows) <= 2 * changes.most:
        parts = [("", rows)]
    else:
        parts = [
            ("Most improved", rows[: min(better, changes.most)]),
            ("Most worsened", rows[::-1][: min(worse, changes.most)]),
        ]
    return {
        "metric": metric,
        "parts": [part for part in parts if part[1]],
        "count": len(rows),
        "better": better,
        "worse": worse,
        "median": _signed(sign * float(np.median([row[0] for row in gains]))),
    }


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


def number(value: float, digits: int = 4) -> str:
    """A number whose spread is not known, to so many digits and never more than six decimals: 14.36, 0.8112, 3012."""
    if value == 0:
        return "0"
    decimals = min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 6)
    return _minus(f"{value:.{decimals}f}")


def _signed(value: float) -> str:
    """A change, with its sign: +0.013, −2.10, 0."""
    return f"{'+' if value > 0 else ''}{number(value, 3)}"


def _minus(text: str) -> str:
    return text.replace("-", "−")
