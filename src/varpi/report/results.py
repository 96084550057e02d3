"""Results of evaluations side by side, with what their numbers depend on."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from varpi.errors import VarpiError
from varpi.evaluation.result import Result, differences
from varpi.report.columns import STANDARD_ERROR
from varpi.report.tables import ResultTable, TableRow, table

KINDS = {
    "distribution": "Images as a whole",
    "geneval": "Objects that prompts ask for",
    "text": "Fit to the prompts",
    "alignment": "Training and use",
}
"""What the table of each kind of result is called."""
MODEL = ("generator", "generator_sha256")
"""What a record of sampling says of the model itself: what rows differ in on purpose."""
SEVERAL_NETWORKS = {"precision", "recall"}
"""Metrics whose names do not tell the network that they are of."""


class NamedResult(NamedTuple):
    """What evaluations found out about one model.

    Of results that share metrics, one a sampling seed, a table shows mean ± standard deviation. Others, such as GenEval
    beside FID, go to tables of their own.
    """

    name: str
    results: Sequence[Result]
    note: str = ""


def tables_of_results(named: Sequence[NamedResult]) -> list[ResultTable]:
    """Results of several models as tables, one for each kind of evaluation, with the settings behind the numbers.

    Raises VarpiError for results that cannot be compared (`evaluation.result.differences`), for the same samples
    counted twice, seeds that were measured differently, a name given twice, and unknown metrics.
    """
    names = [entry.name for entry in named]
    for name in names:
        if names.count(name) > 1:
            raise VarpiError(f"report: two models are called {name}; results of one model go into one NamedResult")
    return [_table_of_group(named, group) for group in _groups(named)]


def _groups(named: Sequence[NamedResult]) -> list[dict[str, list[Result]]]:
    """Results by table and by model: those of one kind that share a metric stand in one table."""
    groups: list[dict[str, list[Result]]] = []
    for entry in named:
        if not entry.results:
            raise VarpiError(f"report: {entry.name} has no results; leave it out or evaluate it")
        for result in entry.results:
            for group in groups:
                if any(_belong_together(result, other) for results in group.values() for other in results):
                    group.setdefault(entry.name, []).append(result)
                    break
            else:
                groups.append({entry.name: [result]})
    order = list(KINDS)
    return sorted(groups, key=lambda group: [*order, _kind(group)].index(_kind(group)))


def _belong_together(one: Result, other: Result) -> bool:
    first, second = set(one.metrics), set(other.metrics)
    return one.kind == other.kind and (first == second or bool(first & second - SEVERAL_NETWORKS))


def _kind(group: Mapping[str, Sequence[Result]]) -> str:
    return next(iter(group.values()))[0].kind


def _table_of_group(named: Sequence[NamedResult], group: Mapping[str, Sequence[Result]]) -> ResultTable:
    notes: list[tuple[str, list[str]]] = []
    rows, errors = [], {}
    for entry in named:
        if entry.name in group:
            unlike = _unlike_seeds(entry.name, group[entry.name])
            if unlike:
                notes.append((f"The sampling seeds of {entry.name} differ in more than the seed:", unlike))
            metrics, errors[entry.name] = _numbers(entry.name, group[entry.name])
            rows.append(TableRow(entry.name, metrics, entry.note))
    unlike = _unlike_rows(group)
    if unlike:
        notes.append(("These rows differ in more than the model:", unlike))
    warnings: dict[str, list[str]] = {}
    for name, results in group.items():
        for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
            warnings.setdefault(warning, []).append(name)
    if warnings:
        lines = [
            warning if len(names) == len(group) else f"{', '.join(names)}: {warning}"
            for warning, names in warnings.items()
        ]
        notes.append(("What the evaluator warns of:", lines))
    return table(rows, KINDS.get(_kind(group), _kind(group)), errors, notes, _settings(group))


def _unlike_seeds(name: str, results: Sequence[Result]) -> list[str]:
    """In what else than the seed the results of one model differ."""
    hashes = [result.samples["sha256"] for result in results if result.samples.get("sha256") is not None]
    if len(set(hashes)) < len(hashes):
        raise VarpiError(f"report: two results of {name} are of the same samples; a spread needs different seeds")
    if len(results) == 1:
        return []
    return _readable(differences({f"“{name}” ({i})": _of_seed(result, None) for i, result in enumerate(results, 1)}))


def _unlike_rows(group: Mapping[str, Sequence[Result]]) -> list[str]:
    """In what else than the model the rows differ; of several seeds, the first stands for all."""
    if len(group) == 1:
        return []
    merged = {}
    for name, results in group.items():
        first = _of_seed(results[0], [(result.sampling or {}).get("seed") for result in results])
        sampling = {key: value for key, value in (first.sampling or {}).items() if key not in MODEL}
        merged[f"“{name}”"] = replace(first, sampling=sampling if first.sampling is not None else None)
    return _readable(differences(merged))


def _of_seed(result: Result, seed: Any) -> Result:
    if result.sampling is None or "seed" not in result.sampling:
        return result
    return replace(result, sampling={**result.sampling, "seed": seed})


def _readable(lines: Sequence[str]) -> list[str]:
    """ "sampling.top_k: …" as "top k: …", and what two parts of a result say alike, once."""
    parts = [line.partition(":") for line in lines]
    return list(dict.fromkeys(f"{name.rpartition('.')[2].replace('_', ' ')}:{values}" for name, _, values in parts))


def _numbers(name: str, results: Sequence[Result]) -> tuple[dict[str, Sequence[float] | float], dict[str, float]]:
    """Metrics of one row, [mean, std] over several results or a number, and standard errors of the numbers."""
    metrics = [metric for metric in results[0].metrics if not metric.endswith(STANDARD_ERROR)]
    if any(set(result.metrics) != set(results[0].metrics) for result in results):
        found = sorted({metric for result in results for metric in result.metrics})
        raise VarpiError(
            f"report: the sampling seeds of {name} were measured by different metrics (in all: {', '.join(found)}); "
            "measure each alike"
        )
    if len(results) == 1:
        only = results[0]
        given = dict(only.details.get("standard_errors", {}))
        appended = {metric: only.metrics.get(metric + STANDARD_ERROR, given.get(metric)) for metric in metrics}
        errors = {metric: error for metric, error in appended.items() if error is not None}
        return {metric: only.metrics[metric] for metric in metrics}, errors
    columns = {metric: [result.metrics[metric] for result in results] for metric in metrics}
    return {metric: [statistics.fmean(values), statistics.stdev(values)] for metric, values in columns.items()}, {}


def _settings(group: Mapping[str, Sequence[Result]]) -> list[tuple[str, str]]:
    """What the numbers depend on, a line each: what all rows share, what each has of its own, reference, evaluator."""
    of_rows = {name: _made_how(results) for name, results in group.items()}
    first = next(iter(of_rows.values()))
    shared = {key: value for key, value in first.items() if all(row.get(key) == value for row in of_rows.values())}
    lines = [("All rows" if len(group) > 1 else "Samples", _listed(shared))]
    for name, row in of_rows.items():
        own = {key: value for key, value in row.items() if key not in shared}
        unknown = all(result.sampling is None for result in group[name])
        lines.append((name, "; ".join(filter(None, [_listed(own), "how it was sampled is not recorded" * unknown]))))
    measured = [result for results in group.values() for result in results]
    reference = next((result.reference for result in measured if result.reference is not None), {})
    lines.append(("Measured against", _listed(_flat(reference))))
    lines.append(("Measured by", _listed(_flat(measured[0].evaluator))))
    return [(title, text) for title, text in lines if text]


def _made_how(results: Sequence[Result]) -> dict[str, str]:
    """How one model's samples were made; where its seeds differ, the values of all."""
    names = {"source": "from", "sha256": "contents sha256"}
    parts = [
        {**_flat({names.get(key, key): value for key, value in result.samples.items()}), **_flat(result.sampling or {})}
        for result in results
    ]
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: ", ".join(dict.fromkeys(part.get(key, "–") for part in parts)) for key in keys}


def _flat(part: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings as {words: text}; what is not set is left out."""
    flat: dict[str, str] = {}
    for key, value in part.items():
        name = f"{before}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name} ")
        elif value is not None:
            flat[name] = _text(value)
    return flat


def _text(value: Any) -> str:
    """A setting as read: a hash by its first 12 digits, a list that is no size by its length."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " × ".join(map(str, value)) if len(value) == 2 else f"{len(value)} values"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{40,128}", text) else text


def _listed(settings: Mapping[str, str]) -> str:
    return "; ".join(f"{name} {value}" for name, value in settings.items())
