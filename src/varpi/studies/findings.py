"""What a study found, as study.json and as a page: rows, costs, paired differences, winners, choices, hashes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from varpi.errors import VarpiError
from varpi.report.columns import COLUMNS, Column
from varpi.report.page import Page, cost, write_page
from varpi.report.pictures import SampleGrid
from varpi.report.provenance import environment
from varpi.report.tables import Cell, ResultTable, TableRow, number, table
from varpi.runtime import files
from varpi.studies.plan import LOWER_IS_BETTER, START, RowSampling, Study
from varpi.studies.summary import is_clear, paired_difference, summarize_seeds, winner
from varpi.studies.tasks import Subject, Weights, decoded
from varpi.weights import load_tokenizer

_FORMAT = 1
COSTS = (
    Column("Images", "lower", "Seen in training, repeats counted, that of the weights it began with included."),
    Column("Minutes", "lower", "Of training, a mean over training seeds, on one core each and beside other work."),
    Column("FLOPs", "lower", "Of training: products of matrices and convolutions of all networks, two a multiply-add."),
    Column("Tokens", "lower", "That pass through the transformer for a sample; guidance doubles them."),
)
"""What stands beside the metrics of each row."""
PLAIN, GUIDED = "without_guidance", "own_guidance"
"""The two tables: rows as their variants say, with the start unless one is just that; each at its own best scale."""


@dataclass
class StudyRow:
    """One line of the tables."""

    name: str
    """Of the variant, or `START`."""
    guided: bool
    """Whether it is the variant's second row, at its own best guidance scale."""
    label: str
    note: str
    trained: bool
    sampling: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the recipe, as chosen."""
    values: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    """By judge and metric, the `Values`."""
    cost: dict[str, float] = field(default_factory=dict)
    """Of training, a mean over seeds: steps, images, seconds, operations. None of them: nothing was trained."""
    passes: int = 0
    """Tokens that the transformer passes for an image sampled."""
    weights: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    drawn: tuple[Weights, Sequence[Sequence[int]]] | None = None
    """The pair, and the tokens of the first samples."""
    diverged: str = ""
    """Why there are no numbers."""


@dataclass
class Findings:
    """All that a study found."""

    study: Study
    seeds: Sequence[int]
    pair: Mapping[str, Any]
    judges: Mapping[str, Mapping[str, str]]
    references: Mapping[str, Mapping[str, Any]]
    rows: Sequence[StudyRow]
    choices: Mapping[str, Sequence[Mapping[str, Any]]]
    device: str
    environment: Mapping[str, str] = field(default_factory=environment)
    """Versions of what it was made with."""

    def of_table(self, which: str) -> list[StudyRow]:
        """The rows of a table that have numbers."""
        rows = [row for row in self.rows if not row.diverged]
        if which == GUIDED:
            return [row for row in rows if row.guided]
        others = [row.sampling for row in rows if not row.trained and row.name != START]
        return [row for row in rows if not row.guided and not (row.name == START and row.sampling in others)]

    @property
    def start(self) -> StudyRow:
        return next(row for row in self.rows if row.name == START and not row.guided)

    @property
    def compared(self) -> StudyRow | None:
        """The variant that others are compared with."""
        name = self.study.compare_with
        return next((row for row in self.rows if row.name == name and not row.guided and not row.diverged), None)


def write_findings(output: Path, findings: Findings, command: str) -> Path:
    """Write study.json and study.html; returns the page."""
    files.write_text(output / "study.json", json.dumps(as_json(findings), indent=1, allow_nan=False) + "\n")
    write_page(output / "study.html", page_of(findings, command))
    return output / "study.html"


def as_json(findings: Findings) -> dict[str, Any]:
    """Everything that the page says and what it rests on. Of two equal studies, only `seconds` differ."""
    study = findings.study
    return {
        "format": _FORMAT,
        "study": study.model_dump(mode="json"),
        "training_seeds": list(findings.seeds),
        "pair": dict(findings.pair),
        "judges": {name: dict(identity) for name, identity in findings.judges.items()},
        "references": {name: dict(reference) for name, reference in findings.references.items()},
        "choices": {name: list(records) for name, records in findings.choices.items()},
        "rows": [_row_as_json(findings, row) for row in findings.rows],
        "winners": {
            which: {judge: winners(rows, judge, study.protocol.metrics) for judge in findings.judges}
            for which in (PLAIN, GUIDED)
            if (rows := findings.of_table(which))
        },
        "environment": {**findings.environment, "device": findings.device},
    }


def read_findings(path: Path) -> Findings:
    """What a study.json holds, as it was found: all but the samples. Raises VarpiError for any other file."""
    found = files.read_json(path)
    try:
        if found["format"] != _FORMAT:
            raise VarpiError(f"{path}: a study of format {found['format']!r:.20}; this varpi reads format {_FORMAT}")
        versions = dict(found["environment"])
        return Findings(
            study=Study.model_validate(found["study"]),
            seeds=found["training_seeds"],
            pair=found["pair"],
            judges=found["judges"],
            references=found["references"],
            rows=[_row_from_json(row) for row in found["rows"]],
            choices=found["choices"],
            device=versions.pop("device"),
            environment=versions,
        )
    except VarpiError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise VarpiError(f"{path}: not what `varpi study` writes ({files.line(error)})") from error


def winners(rows: Sequence[StudyRow], judge: str, metrics: Sequence[str]) -> dict[str, str]:
    """By metric, the variant that is better than all others by more than the spread over seeds, where there is one."""
    found = {}
    for metric in metrics:
        values = {row.name: row.values[judge][metric] for row in rows if metric in row.values.get(judge, {})}
        if values and (best := winner(values, lower_is_better=metric in LOWER_IS_BETTER)) is not None:
            found[metric] = best
    return found


def row_differences(row: StudyRow, other: StudyRow) -> dict[str, dict[str, Any]]:
    """By judge and metric, the paired difference of two rows."""
    return {
        judge: {
            metric: paired_difference(values, other.values[judge][metric])
            for metric, values in metrics.items()
            if metric in other.values.get(judge, {})
        }
        for judge, metrics in row.values.items()
    }


def _row_as_json(findings: Findings, row: StudyRow) -> dict[str, Any]:
    about = {
        "name": row.name,
        "guided": row.guided,
        "label": row.label,
        "note": row.note,
        "trained": row.trained,
    }
    if row.diverged:
        return {**about, "diverged": row.diverged}
    against = {"start": findings.start, "compare_with": findings.compared}
    return {
        **about,
        "sampling": row.sampling,
        "changes": row.changes,
        "metrics": {
            judge: {metric: summarize_seeds(values) for metric, values in metrics.items()}
            for judge, metrics in row.values.items()
        },
        "differences": {
            what: row_differences(row, other)
            for what, other in against.items()
            if other is not None and other is not row
        },
        "cost": {**row.cost, "transformer_tokens_per_sample": row.passes},
        "weights": row.weights,
        "warnings": row.warnings,
    }


def _row_from_json(found: Mapping[str, Any]) -> StudyRow:
    about = (found["name"], found["guided"], found["label"], found.get("note", ""), found["trained"])
    if "diverged" in found:
        return StudyRow(*about, diverged=found["diverged"])
    cost = dict(found["cost"])
    passes = cost.pop("transformer_tokens_per_sample")
    values = {
        judge: {metric: summary["values"] for metric, summary in metrics.items()}
        for judge, metrics in found["metrics"].items()
    }
    same = {key: found[key] for key in ("sampling", "changes", "weights", "warnings")}
    return StudyRow(*about, values=values, cost=cost, passes=passes, **same)


# -- the page


def page_of(findings: Findings, command: str) -> Page:
    """The page, of tables by judge, pictures of rows whose samples are at hand, costs and what was chosen how."""
    study = findings.study
    return Page(
        title=study.title,
        paragraph=_paragraph(findings),
        command=command,
        verdict=_verdict(findings),
        reading=_reading(findings),
        tables=[one for judge in findings.judges for one in _tables(findings, judge)],
        samples=[_grid(row, findings) for row in findings.of_table(PLAIN) if row.drawn is not None],
        chosen=_chosen(findings),
        environment={
            **findings.environment,
            "device": findings.device,
            **{name.replace("_", " "): str(value)[:12] for name, value in findings.pair.items() if "sha256" in name},
        },
        recipe=study.to_yaml(),
        recipe_title="Study",
    )


def _verdict(findings: Findings) -> str:
    """What the compared variant changed of the start, and which row leads, by the metric that choices were made by."""
    choice, judge = findings.study.validation, next(iter(findings.judges))
    metric = choice.metric if choice is not None else findings.study.protocol.metrics[0]
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    sentences = [f"{COLUMNS[metric].label} by {judge}, {better} is better."]
    row, rows = findings.compared, findings.of_table(PLAIN)
    change = None if row is None else row_differences(row, findings.start).get(judge, {}).get(metric)
    if row is not None and change is not None:
        mean, spread = change["mean"], change["spread"]
        shown = f"{mean:+.3f}".replace("-", "−")
        if spread is None:
            sentences.append(f"{row.label} against the start: {shown}, whose spread over seeds is not known.")
        else:
            what = "a gain" if (mean < 0) == (better == "lower") else "a loss"
            said = f"{what} beyond the spread over seeds" if is_clear(change) else "within the spread over seeds"
            spread = max(spread, change["sampling_spread"] or 0.0)
            sentences.append(f"{row.label} against the start: {shown} ± {spread:.3f}, {said}.")
    best = next((row.label for row in rows if row.name == winners(rows, judge, [metric]).get(metric)), None)
    leads = "No row leads" if best is None else f"{best} leads"
    sentences.append(f"{leads} all others by more than the spreads of their difference.")
    return " ".join(sentences)


def _paragraph(findings: Findings) -> str:
    study, protocol, choice = findings.study, findings.study.protocol, findings.study.validation
    seeds = ", ".join(map(str, findings.seeds))
    reference = next(iter(findings.references.values()))
    each = f"{len(protocol.sampling_seeds)} sampling seed{'s' * (len(protocol.sampling_seeds) > 1)}"
    what = f"against {reference['count']} images of {study.data.source} ({_short(protocol.split)})"
    if findings.pair["num_classes"] is None:
        what = f"by GenEval's rules, one for each of the first captions of {study.data.source}"
        right = [f"{one['metrics']['overall']:.4f} ({judge})" for judge, one in findings.references.items()]
        what += f" (of the real scenes they find right: {', '.join(right)})"
    sentences = [
        study.paragraph.strip(),
        f"Trained with the seeds {seeds}; each row is measured on {protocol.samples} samples for each of {each} "
        f"{what}, by networks that reward none of the methods.",
    ]
    if choice is not None:
        trials = max((len(variant.tune) for variant in study.variants.values()), default=0)
        untuned = [
            variant.label or name for name, variant in study.variants.items() if variant.recipe and not variant.tune
        ]
        sentences.append(
            f"What was chosen was chosen on {_short(choice.split)}, by {choice.samples} samples of seed "
            f"{choice.sampling_seed}, which no figure uses, of the runs of training seed {study.seeds[0]}"
            + (f"; {trials} trials for each method" if trials else "")
            + (f", none for {', '.join(untuned)}" if trials and untuned else "")
            + "."
        )
    return " ".join(sentence for sentence in sentences if sentence)


def _short(split: str) -> str:
    """A split's name; of one put together from many parts, the first."""
    return split if len(split) <= 40 else f"{split.partition('+')[0]} + …"


def _reading(findings: Findings) -> str:
    several = len(findings.seeds) > 1
    spread = (
        "± is the standard deviation over training seeds, of means over sampling seeds; rows without training have "
        "that over sampling seeds, and say so. "
        if several
        else "There is one training seed, so that ± is the standard deviation over sampling seeds only. "
    )
    return spread + (
        "A number is marked where it is better than every other of its column by more than the spread of the paired "
        "difference over training seeds and that over sampling seeds; where none is marked, none is. Differences are "
        "of pairs that share the training seed and the sampling seed."
    )


def _tables(findings: Findings, judge: str) -> list[ResultTable]:
    metrics = findings.study.protocol.metrics
    titles = {PLAIN: f"Judged by {judge}", GUIDED: f"Judged by {judge}: each at its own best guidance scale"}
    made = []
    for which, title in titles.items():
        rows = [row for row in findings.of_table(which) if row.values.get(judge)]
        if not rows:
            continue
        best = winners(rows, judge, metrics)
        lines = [TableRow(row.label, _shown(row, judge), _note(row)) for row in rows]
        marked = {metric: next(row.label for row in rows if row.name == name) for metric, name in best.items()}
        one = table(lines, title, marked=marked, notes=_notes(findings, rows, judge), settings=_spreads(rows, judge))
        made.append(_with_costs(one, rows))
    for what, other in (("the start", findings.start), (findings.study.compare_with, findings.compared)):
        rows = [row for row in findings.of_table(PLAIN) if other is not None and row.name != other.name]
        rows = [row for row in rows if row.values.get(judge) and row.values != findings.start.values]
        if other is None or not rows:
            continue
        lines = []
        for row in rows:
            found = row_differences(row, other)[judge]
            lines.append(
                TableRow(row.label, {metric: _pair(one["mean"], one["spread"]) for metric, one in found.items()})
            )
        label = what if other is findings.start else other.label
        made.append(table(lines, f"Judged by {judge}: difference to {label}", marked={}))
    return made


def _shown(row: StudyRow, judge: str) -> dict[str, Any]:
    shown = {}
    for metric, values in row.values[judge].items():
        summary = summarize_seeds(values)
        spread = summary["spread"] if summary["spread"] is not None else summary["sampling_spread"]
        shown[metric] = _pair(summary["mean"], spread)
    return shown


def _pair(mean: float, spread: float | None) -> list[float] | float:
    return mean if spread is None else [mean, spread]


def _note(row: StudyRow) -> str:
    """What a reader of the row has to know."""
    plain = RowSampling().model_dump()
    sampling = {name: value for name, value in row.sampling.items() if value != plain[name]}
    untrained = "" if row.trained else "± over sampling seeds"
    return "; ".join(filter(None, [row.note, ", ".join(_words({**row.changes, **sampling})), untrained]))


def _notes(findings: Findings, rows: Sequence[StudyRow], judge: str) -> list[tuple[str, Sequence[str]]]:
    warnings = dict.fromkeys(line for row in rows for line in row.warnings.get(judge, ()))
    diverged = [f"{row.label}: {row.diverged}" for row in findings.rows if row.diverged and not row.guided]
    notes = [
        ("What the evaluator warns of:", [*warnings]),
        ("Not in the table, for their training diverged:", diverged),
    ]
    return [note for note in notes if note[1]]


def _spreads(rows: Sequence[StudyRow], judge: str) -> list[tuple[str, str]]:
    """The spread over sampling seeds, apart from that over training seeds."""
    lines = []
    for row in rows:
        summaries = {metric: summarize_seeds(values) for metric, values in row.values[judge].items()}
        parts = [
            f"{metric.replace('_', ' ')} {number(summary['sampling_spread'], 2)}"
            for metric, summary in summaries.items()
            if row.trained and summary["spread"] is not None and summary["sampling_spread"] is not None
        ]
        if parts:
            lines.append((f"{row.label}: ± over sampling seeds", ", ".join(parts)))
    return lines


def _with_costs(of_metrics: ResultTable, rows: Sequence[StudyRow]) -> ResultTable:
    """A table with the cost of each row beside it."""
    lines = []
    for line, row in zip(of_metrics.rows, rows, strict=True):
        costs = [
            row.cost.get("images", 0),
            row.cost.get("seconds", 0) / 60,
            float(row.cost.get("operations", 0)),
            row.passes,
        ]
        cells = [Cell(cost(value), "", "", best=False) for value in costs]
        lines.append({**line, "cells": [*line["cells"], *cells]})
    return of_metrics._replace(columns=[*of_metrics.columns, *COSTS], rows=lines)


def _chosen(findings: Findings) -> list[tuple[str, str]]:
    """What was tried for each variant, and what was taken."""
    labels = {name: variant.label or name for name, variant in findings.study.variants.items()}
    said = [records for name, records in findings.choices.items() if name != START]
    lines = []
    for name, records in findings.choices.items():
        if name == START and records in said:
            continue
        for what in ("changes", "sampling"):
            tried = [record for record in records if what in record]
            varied = {
                key
                for one in tried
                for key in one[what]
                if any(one[what].get(key) != other[what].get(key) for other in tried)
            }
            parts = []
            for record in tried:
                settings = ", ".join(_words({key: value for key, value in record[what].items() if key in varied}))
                value = "diverged" if record["value"] is None else number(record["value"], 3)
                parts.append(f"{settings}: {value}{' (taken)' if record['chosen'] else ''}")
            if parts:
                lines.append((labels.get(name, "Start"), "; ".join(parts)))
    return lines


def _words(settings: Mapping[str, Any]) -> list[str]:
    """{"optimizer.learning_rate": 1e-4} as "learning rate 0.0001"."""
    return [f"{key.rpartition('.')[2].replace('_', ' ')} {value}" for key, value in settings.items()]


def _grid(row: StudyRow, findings: Findings) -> SampleGrid:
    assert row.drawn is not None
    weights, tokens = row.drawn
    asked = Subject(findings.pair["num_classes"], findings.study.data, findings.study.protocol.split)
    images = decoded(load_tokenizer(weights.tokenizer), torch.tensor(tokens))
    return SampleGrid(row.label, images, asked.first(len(tokens)))
