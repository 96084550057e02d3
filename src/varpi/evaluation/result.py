"""One evaluation as a file: its numbers, and everything they depend on, so that two can be compared honestly."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import varpi
from varpi.errors import VarpiError
from varpi.runtime.files import read_text, write_text

RESULT_FORMAT = 1
MARKER = f'{{\n  "format": {RESULT_FORMAT},\n  "kind": "'.encode()
"""How the file of a result begins."""


@dataclass(frozen=True)
class Result:
    """The numbers of one set of samples."""

    kind: str
    """"distribution", "geneval", "text" or "alignment"."""
    metrics: Mapping[str, float]
    """By name; all finite."""
    samples: Mapping[str, Any]
    """What was measured: source, sha256 (of the set's contents), count, image size."""
    sampling: Mapping[str, Any] | None
    """How they were made, as `varpi sample` recorded it: guidance, temperature, seed, checkpoint, …; None: unknown."""
    reference: Mapping[str, Any] | None
    """What they were measured against: source, sha256, count; None where nothing is."""
    evaluator: Mapping[str, Any]
    """By what: the networks with the sha256 of their weights, and every setting that moves a number."""
    warnings: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """Finer numbers: by class, by task, by image."""


def write_result(path: Path, result: Result) -> None:
    """Write a result as JSON. Raises VarpiError for a number that is not finite."""
    for name, value in result.metrics.items():
        if not math.isfinite(value):
            raise VarpiError(f"{path}: {name} is {value}; a result holds finite numbers only")
    software = {"varpi": varpi.__version__, "torch": torch.__version__}
    write_text(path, json.dumps({"format": RESULT_FORMAT, **asdict(result), "software": software}, indent=2) + "\n")


def read_result(path: Path) -> Result:
    """A result that `write_result` wrote. Raises VarpiError for anything else."""
    try:
        content = json.loads(read_text(path))
        if content["format"] != RESULT_FORMAT:
            raise VarpiError(
                f"{path}: has format {content['format']}; this varpi reads format {RESULT_FORMAT}: update varpi"
            )
        return Result(**{name: content[name] for name in Result.__dataclass_fields__})
    except VarpiError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise VarpiError(f"{path}: is not a result of `varpi evaluate` ({type(error).__name__}: {error})") from error


def differences(results: Mapping[str, Result]) -> list[str]:
    """In what the settings behind results of one kind differ, a line each, for a reader who compares their numbers.

    results: by name, two at least. Raises VarpiError when they cannot be compared at all: measured against different
    references, by different evaluators, or of different kinds. A result that was measured against nothing compares.
    """
    names, first = list(results), next(iter(results.values()))
    for name, result in results.items():
        if result.kind != first.kind:
            raise VarpiError(f"{names[0]} is a {first.kind} result and {name} a {result.kind} one: not to be compared")
    for what in ("reference", "evaluator"):
        found = [(name, part) for name, result in results.items() if (part := getattr(result, what)) is not None]
        for name, part in found[1:]:
            if unlike := _unlike(found[0][1], part):
                raise VarpiError(
                    f"{found[0][0]} and {name} have another {what} ({', '.join(unlike)}): their numbers do not compare"
                )
    lines = []
    for what in ("samples", "sampling"):
        sides = {name: _identity(getattr(result, what)) for name, result in results.items()}
        for key in sorted(set().union(*sides.values()) - {"sha256", "source", "output"}):
            values = {name: side.get(key) for name, side in sides.items()}
            if len({json.dumps(value) for value in values.values()}) > 1:
                shown = ", ".join(f"{name} {json.dumps(value)[:60]}" for name, value in values.items())
                lines.append(f"{what}.{key}: {shown}")
    return lines


def _identity(part: Mapping[str, Any] | None) -> dict[str, Any]:
    """What two sides must share; where a reference lies does not matter, what it holds does."""
    other = ("source", "image_column", "device", "seconds")
    return {key: value for key, value in (part or {}).items() if key not in other}


def _unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two references or evaluators differ; in their statistics only for metrics that both have."""
    one, other = _identity(one), _identity(other)
    told, others = one.get("statistics", {}), other.get("statistics", {})
    shared = told.keys() & others.keys()
    one["statistics"], other["statistics"] = ({name: part[name] for name in shared} for part in (told, others))
    return [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
