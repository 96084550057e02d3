"""Results side by side: their spread, what they depend on, and what must not be compared."""

import io
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from report_parts import EVIL, pictures, result

from varpi.errors import VarpiError
from varpi.evaluation import evaluate_distribution, open_reference
from varpi.report import ClassChanges, NamedResult, Page, comparison, render
from varpi.report.columns import COLUMNS
from varpi.report.results import tables_of_results
from varpi.report.tables import ResultTable
from varpi.samples.images import save_npz
from varpi.samples.reading import open_samples

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


def test_changes_and_extremes_are_of_the_first_results_that_have_them(tmp_path):
    """Whatever else a model's results are of, and in whatever order they are given."""
    objects = result({"overall": 0.3}, kind="geneval", samples={})
    base, tuned = ({"class_agreement": {"0": share, "1": 0.5}} for share in (0.25, 0.75))
    by_class = [result({"class_agreement": 0.5}, details=details) for details in (base, tuned)]
    both = {"Base": [objects, by_class[0]], "Other": [objects], "Tuned": [objects, by_class[1], by_class[0]]}
    changes = {"0": (0.25, 0.75), "1": (0.5, 0.5)}
    assert comparison._changes(both) == [ClassChanges("class_agreement", changes)]
    assert comparison._changes({"Base": by_class}) == []

    save_npz(tmp_path / "samples.npz", pictures(3))
    texts = [
        result({metric: 2.0}, kind="text", samples={"source": source}, details={"images": {metric: scores}})
        for metric, source, scores in (
            ("clip_score", tmp_path / "gone.npz", [0.0, 0.0, 0.0]),
            ("clip_score", tmp_path / "samples.npz", [1.0, 2.0, 3.0]),
            ("clip_score", tmp_path / "samples.npz", [4.0, 4.0, 4.0]),
            ("hps_v2.1", tmp_path / "samples.npz", [3.0, 2.0, 1.0]),
        )
    ]
    found = comparison._extremes({"Base": [objects, *texts], "Tuned": [objects]})
    shown = [(scored.caption, scored.score, scored.scores) for scored in found]
    assert shown == [("Base", "clip_score", [1.0, 2.0, 3.0]), ("Base", "hps_v2.1", [3.0, 2.0, 1.0])]
    assert all(np.array_equal(scored.images, pictures(3)) for scored in found)


class Mean:
    """Two channels' means, as a `FeatureExtractor`."""

    name = "mean"
    identity = {"name": "mean"}  # noqa: RUF012
    streams = {"pool": 2}  # noqa: RUF012
    warnings = ()

    def __call__(self, images):
        return {"pool": images[:, :2].float().mean(dim=(2, 3))}


def test_embeddings_are_of_images_at_even_distances(tmp_path, monkeypatch):
    """Of a slice of a table that is sorted by class, whose images are in a column of another name."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    images = np.repeat(np.arange(30, dtype=np.uint8), 8 * 8 * 3).reshape(30, 8, 8, 3)
    save_npz(tmp_path / "samples.npz", images[:15])
    cells = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    (tmp_path / "real").mkdir()
    table = pa.table({"img": cells, "label": [i // 10 for i in range(30)]})
    pq.write_table(table, tmp_path / "real" / "train.parquet")
    reference = open_reference(tmp_path / "real", split="train[:20]", image_size=8, image_column="img")
    samples, extractor = open_samples(tmp_path / "samples.npz"), Mean()
    measured = evaluate_distribution(samples, reference, extractor=extractor, metrics=("fid",))
    text = result({"clip_score": 0.3}, kind="text", samples={"source": tmp_path / "gone"})
    found = comparison._embeddings({"Base": [text, measured]}, extractor, 10)
    assert {name: values[:, 0].tolist() for name, values in found.sets.items()} == {
        "real": [*range(0, 20, 2)],
        "Base": [0, 1, 3, 4, 6, 7, 9, 10, 12, 13],
    }
    with pytest.raises(VarpiError, match="embeddings need results that were measured against a reference of images"):
        comparison._embeddings({"Base": [text]}, extractor, 10)


def test_rows_of_other_metrics_stand_in_one_table():
    def row(model, metrics, *statistics):
        reference = {"source": "adm.npz", "sha256": "c" * 64, "statistics": dict.fromkeys(statistics, "stored")}
        return NamedResult(model, [result(metrics, model=model, reference=reference if statistics else None)])

    (table,) = tables(
        row("alone", {"inception_score": 2.0}),
        row("base", {"inception_score": 3.0, "fid": 9.0, "sfid": 9.0}, "fid", "sfid"),
        row("tuned", {"fid": 8.0}, "fid"),
    )
    assert [row["name"] for row in table.rows] == ["alone", "base", "tuned"]
    assert dict(table.settings)["Measured against"].startswith("source adm.npz; sha256 cccccccccccc…")
