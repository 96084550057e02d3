"""Results side by side: their spread, what they depend on, and what must not be compared."""

import math
from dataclasses import replace

import pytest
from report_parts import EVIL, result

from varpi.errors import VarpiError
from varpi.report import NamedResult, Page, render
from varpi.report.columns import COLUMNS
from varpi.report.results import tables_of_results
from varpi.report.tables import ResultTable

FID = {"fid": 10.0, "precision": 0.6}


def values(table: ResultTable) -> list[list[tuple[str, str, str, bool] | None]]:
    return [[None if cell is None else tuple(cell) for cell in row["cells"]] for row in table.rows]


def tables(*named: NamedResult) -> list[ResultTable]:
    return tables_of_results(named)


def test_several_seeds_have_a_spread_and_a_single_one_has_none():
    seeds = [result({"fid": fid}, seed=i) for i, fid in enumerate((10.0, 12.0, 14.0))]
    (table,) = tables(NamedResult("Base", seeds), NamedResult("Tuned", [result({"fid": 9.25}, model="tuned.pt")]))
    assert values(table) == [[("12", "2", "", False)], [("9.250", "", "", True)]]
    assert table.spread
    assert table.single
    assert not table.errors


def test_a_spread_is_unbiased():
    (table,) = tables(NamedResult("Base", [result({"fid": 10.0 + i}, seed=i) for i in range(2)]))
    assert values(table)[0][0] == ("10.5", f"{math.sqrt(0.5):.1f}", "", False)  # of one row nothing is the best


@pytest.mark.parametrize(
    ("metric", "numbers", "best"),
    [("fid", (3.0, 2.0), 1), ("recall", (0.3, 0.2), 0), ("entropy_gap", (-0.3, 0.2), 1), ("kid", (0.1, 0.1), None)],
)
def test_the_best_lies_on_the_metrics_better_side(metric, numbers, best):
    rows = [NamedResult(name, [result({metric: x}, model=name)]) for name, x in zip(("a", "b"), numbers, strict=True)]
    (table,) = tables(*rows)
    marked = [cells[0][-1] for cells in values(table) if cells[0] is not None]
    assert marked == ([True, True] if best is None else [i == best for i in range(2)])


def test_metrics_have_a_label_a_side_and_a_sentence():
    for name in ("fid", "sfid", "kid", "fd_dinov2", "clip_score", "hps_v2.1", "hps_v2.0", "overall", "color_attr"):
        assert COLUMNS[name].better == ("higher" if name[0] in "coh" else "lower")
    assert [name for name, metric in COLUMNS.items() if metric.better == "nearer 0"] == [
        "entropy_gap",
        "log_likelihood_gap",
    ]
    assert len({metric.label for metric in COLUMNS.values()}) == len(COLUMNS)
    assert all(metric.meaning.endswith(".") for metric in COLUMNS.values())


def test_the_evaluators_metrics_are_all_known():
    from varpi.evaluation import alignment

    assert set(alignment.QUANTITIES) <= set(COLUMNS)


def test_what_the_numbers_depend_on():
    base = [result(FID, seed=seed) for seed in (0, 1)]
    tuned = [result(FID, seed=seed, model="tuned.pt") for seed in (0, 1)]
    (table,) = tables(NamedResult("Base", base), NamedResult("Tuned", tuned))
    settings = dict(table.settings)
    shared = "count 5000; tokenizer vq.pt; guidance scale 1.0; temperature 1.0; top k 0; seed 0, 1"
    assert settings["All rows"] == f"{shared}; classes count 5000; classes different 10"
    assert settings["Tuned"].startswith("from out/tuned.pt/0, out/tuned.pt/1; contents sha256 ")
    assert settings["Tuned"].endswith("generator tuned.pt; generator sha256 bbbbbbbbbbbb…")
    assert settings["Measured against"] == "source adm.npz; sha256 cccccccccccc…; count 10000"
    assert (
        settings["Measured by"] == "extractor name inception; extractor sha256 dddddddddddd…; neighbors 3; device cpu"
    )
    assert table.notes == []


def test_rows_that_differ_in_more_than_the_model_say_so():
    rows = (
        NamedResult("Base", [result(FID, seed=seed) for seed in (0, 1)]),
        NamedResult("Tuned", [result(FID, model="tuned.pt", guidance_scale=2.0)]),
    )
    (table,) = tables(*rows)
    assert table.notes == [
        (
            "These rows differ in more than the model:",
            ["guidance scale: “Base” 1.0, “Tuned” 2.0", "seed: “Base” [0, 1], “Tuned” [0]"],
        )
    ]
    page = render(Page("t", "p", "c", results=rows))
    assert "<p>These rows differ in more than the model:</p>" in page
    assert "<li>guidance scale: “Base” 1.0, “Tuned” 2.0</li>" in page


def test_seeds_that_differ_in_more_than_the_seed_say_so():
    (table,) = tables(NamedResult("Base", [result(FID), result(FID, seed=1, temperature=0.9)]))
    assert table.notes == [
        ("The sampling seeds of Base differ in more than the seed:", ["temperature: “Base” (1) 1.0, “Base” (2) 0.9"])
    ]
    assert "temperature 1.0, 0.9" in dict(table.settings)["Samples"]


def test_unknown_sampling_is_said():
    (table,) = tables(NamedResult("Theirs", [result(FID, sampling=None)]))
    assert dict(table.settings)["Theirs"] == "how it was sampled is not recorded"


def test_warnings_name_the_rows_that_they_are_of():
    (table,) = tables(
        NamedResult("Base", [result(FID, warnings=["few", "small"])]),
        NamedResult("Tuned", [result(FID, model="tuned.pt", warnings=["few"])]),
    )
    assert table.notes == [("What the evaluator warns of:", ["few", "Base: small"])]


def test_kinds_and_networks_have_tables_of_their_own():
    dino = {"extractor": {"name": "dinov2"}}
    found = tables(
        NamedResult(
            "Base",
            [
                result({"overall": 0.3}, kind="geneval"),
                result(FID),
                result({"fd_dinov2": 200.0, "precision": 0.5}, evaluator=dino),
            ],
        ),
        NamedResult("Tuned", [result({"fd_dinov2": 150.0, "precision": 0.5, "recall": 0.5}, evaluator=dino)]),
    )
    assert [(table.title, [row["name"] for row in table.rows]) for table in found] == [
        ("Images as a whole", ["Base"]),
        ("Images as a whole", ["Base", "Tuned"]),
        ("Objects that prompts ask for", ["Base"]),
    ]
    assert [metric.label for metric in found[1].columns] == ["FD-DINOv2", "Precision", "Recall"]
    assert values(found[1])[0][2] is None


def test_standard_errors_over_images_stand_beside_their_metric():
    text = {"clip_score": 0.27123, "clip_score_standard_error": 0.0021}
    (table,) = tables(NamedResult("Base", [result(text, kind="text")]))
    assert values(table) == [[("0.271", "", "0.002", False)]]
    alignment = result({"entropy_gap": -0.31}, kind="alignment", details={"standard_errors": {"entropy_gap": 0.024}})
    page = render(Page("t", "p", "c", results=[NamedResult("Base", [alignment])]))
    assert '<td>−0.31 <span class="std">s.e. 0.02</span></td>' in page
    assert "s.e. is the standard error over images" in page
    assert "nearer 0 is better" in page


def test_results_are_escaped():
    evil = result(
        {"fid": 1.0},
        model=EVIL,
        warnings=[EVIL],
        reference={"source": EVIL},
        evaluator={EVIL: EVIL},
        kind=EVIL,
    )
    other = replace(evil, samples={"sha256": "0", EVIL: EVIL})
    page = render(Page("t", "p", "c", results=[NamedResult(EVIL, [evil], EVIL), NamedResult("b", [other])]))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 10


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([NamedResult("Base", [])], "Base has no results; leave it out or evaluate it"),
        ([NamedResult("Base", [result(FID)])] * 2, "two models are called Base"),
        ([NamedResult("Base", [result(FID), result(FID)])], "two results of Base are of the same samples"),
        ([NamedResult("Base", [result({"fidelity": 1.0})])], "Base has an unknown metric fidelity; known are"),
        (
            [NamedResult("Base", [result(FID), result({"fid": 1.0}, seed=1)])],
            r"seeds of Base were measured by different metrics \(in all: fid, precision\)",
        ),
        (
            [NamedResult("Base", [result(FID)]), NamedResult("T", [result(FID, seed=1, reference={"sha256": "e"})])],
            "“Base” and “T” have another reference .*do not compare",
        ),
    ],
)
def test_bad_results(named, message):
    with pytest.raises(VarpiError, match=message):
        tables_of_results(named)


def test_a_result_that_is_not_finite_is_refused():
    with pytest.raises(VarpiError, match="fid of Base is nan; it must be a finite"):
        tables(NamedResult("Base", [result({"fid": math.nan})]))
