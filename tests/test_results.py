"""The numbers in README and docs/results.md are those of the committed results."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = ("frechet_distance", "precision", "recall", "class_agreement")
TASKS = ("overall", "single_object", "two_object", "counting", "colors", "position", "color_attr")
DEMO = {
    "base": "base",
    "base, temperature 0.8": "base_best_temperature",
    "cross-entropy alone": "control",
    "VA-π, the paper's form": "va_pi",
    "VA-π, best setting": "tuned",
    "base, guidance 2.0 (twice the sampling cost)": "base_guided",
    "VA-π, the paper's form, guidance 1.5 (twice the sampling cost)": "va_pi_guided",
}
SEEDS = {
    "cross-entropy alone": "next_token",
    "VA-π, the paper's form, G = 16": "va_pi",
    "first-order reward, G = 2": "first_order",
    "first-order reward, G = 2, guided prior": "first_order_guided",
}


def table(document: str, heading: str, below: str | None = None) -> dict[str, list[str]]:
    """Of the tables under a heading, or one below it: first cell -> the other cells."""
    text = (ROOT / document).read_text().split(f"\n## {heading}")[1].split("\n## ")[0]
    parts = text.split("\n### ")
    text = parts[0] if below is None else next(part for part in parts if part.startswith(below))
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line[:2] == "| "]
    return {row[0].strip("* "): [cell.strip("* ") for cell in row[1:]] for row in rows}


def shown(mean: float, spread: float) -> str:
    return f"{mean:.3f} ± {spread:.3f}"


def brief(number: Mapping[str, float], spread: str, places: int) -> str:
    return f"{number['mean']:.{places}f} ± {number[spread]:.{places}f}"


def operations(row: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """Of training, in those of another row's."""
    return f"{row['cost']['operations'] / whole['cost']['operations']:.2f}" if row["trained"] else ""


def of_photographs(row: Mapping[str, Any], spread: str) -> list[str]:
    """Both Fréchet distances, recall and class agreement."""
    judge, features = (row["metrics"][which] for which in ("cifar10", "efficientnet-lite0"))
    return [
        brief(judge["frechet_distance"], spread, 2),
        brief(features["frechet_distance"], spread, 1),
        brief(judge["recall"], spread, 2),
        brief(judge["class_agreement"], spread, 2),
    ]


def study(name: str = "digits") -> list[dict[str, Any]]:
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())["rows"]


def told(name: str = "digits") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What a page calls each row of a study, which spread it shows, and the row."""
    for row in study(name):
        if row["name"] != "start" and not (row["guided"] and scale(row) == 1):
            label = f"{row['label']}, guidance {scale(row)}" if row["guided"] else row["label"]
            yield label, "spread" if row["trained"] else "sampling_spread", row


def scale(row: Mapping[str, Any]) -> float:
    return row["sampling"]["guidance_scale"]


def test_the_demo_in_the_readme() -> None:
    results, stated = json.loads((ROOT / "docs/results/demo.json").read_text()), table("README.md", "What the demo")
    assert {name: stated.get(name) for name in DEMO} == {
        name: [shown(*results[row][column]) for column in COLUMNS] for name, row in DEMO.items()
    }


def test_the_training_seeds_in_the_readme() -> None:
    stated = table("README.md", "What holds over training seeds")
    by_name = {row["name"]: row for row in study()}
    for name, row in SEEDS.items():
        of = {one["guided"]: one for one in study() if one["name"] == row}
        plain, guided = (of[which]["metrics"]["digits"]["frechet_distance"] for which in (False, True))
        assert stated[name] == [
            shown(plain["mean"], plain["spread"]),
            "the same: none" if scale(of[True]) == 1 else shown(guided["mean"], guided["spread"]),
            operations(by_name[row], by_name["va_pi"]).removesuffix(".00"),
        ]


def test_the_study_of_digits() -> None:
    stated, rows = table("docs/results.md", "Digits"), [*told()]
    assert len(rows) > 8
    for name, spread, row in rows:
        metrics = row["metrics"]["digits"]
        assert stated[name][:4] == [shown(metrics[one]["mean"], metrics[one][spread]) for one in COLUMNS], name


def test_the_study_of_photographs() -> None:
    stated = table("docs/results.md", "Photographs")
    rows = [*told("cifar10-table2")]
    plain = {row["name"]: row for _, _, row in rows if not row["guided"]}
    assert len(rows) == 42

    def by_temperature(row: dict[str, Any], judge: str) -> str:
        base, cooler, own = (
            one["metrics"][judge]["frechet_distance"]["mean"] for one in (plain["base"], plain["base_temperature"], row)
        )
        return "no gain" if own >= base else "all" if cooler <= own else f"{100 * (base - cooler) / (base - own):.0f} %"

    for name, spread, row in rows:
        cells = of_photographs(row, spread)
        if not row["guided"]:
            untouched = row["name"] in ("base", "base_temperature")
            cells[1:1] = ["" if untouched else by_temperature(row, "cifar10")]
            cells[3:3] = ["" if untouched else by_temperature(row, "efficientnet-lite0")]
            chosen = (f"{key.split('.')[-1].replace('_', ' ')} {value}" for key, value in row["changes"].items())
            cells += [", ".join(chosen), operations(row, plain["va_pi"])]
        assert stated[name] == cells, name


@pytest.mark.parametrize(
    ("below", "name", "whole", "count"),
    [
        ("What each term does", "cifar10-table4", "va_pi", 7),
        ("Which prior", "cifar10-figure4", "cross_entropy_01", 13),
        ("How many samples", "cifar10-group-size", "va_pi_8", 9),
    ],
)
def test_the_ablations_on_photographs(below: str, name: str, whole: str, count: int) -> None:
    stated, rows = table("docs/results.md", "Photographs", below), [*told(name)]
    by_name = {row["name"]: row for _, _, row in rows}
    assert len(rows) == count
    for label, spread, row in rows:
        one_seed = row["metrics"]["cifar10"]["recall"]["spread"] is None
        cells = of_photographs(row, "sampling_spread" if one_seed else spread)
        assert stated[label] == [*cells, operations(row, by_name[whole])], label


def test_the_study_of_context_noise() -> None:
    stated, rows = table("docs/results.md", "Text", "Context noise"), [*told("shapes-table5")]
    assert len(rows) == 6
    for name, spread, row in rows:
        seen, unseen = (row["metrics"][judge] for judge in ("shapes-detector", "shapes-detector-held_out"))
        metrics = [*(seen[task] for task in TASKS), unseen["overall"]]
        assert stated[name] == [shown(one["mean"], one[spread]) for one in metrics], name


def test_the_study_of_captioned_shapes() -> None:
    stated, rows = table("docs/results.md", "Text"), [*told("shapes-table3")]
    whole = next(row for _, _, row in rows if row["name"] == "va_pi")
    assert len(rows) == 11
    for name, spread, row in rows:
        seen, unseen = (row["metrics"][judge] for judge in ("shapes-detector", "shapes-detector-held_out"))
        metrics = [*(seen[task] for task in TASKS), unseen["overall"]]
        cells = [shown(one["mean"], one[spread]) for one in metrics]
        assert stated[name] == [*cells, operations(row, whole)], name
