from dataclasses import replace
from pathlib import Path

import pytest

from varpi.errors import VarpiError
from varpi.evaluation import Result, differences, read_result, write_result

RESULT = Result(
    kind="distribution",
    metrics={"fid": 7.65},
    samples={"source": "a", "sha256": "1", "count": 50_000},
    sampling={"guidance_scale": 1.0, "seed": 0},
    reference={"source": "here.npz", "sha256": "2"},
    evaluator={"features": "inception", "device": "cuda"},
    warnings=("few",),
    details={"classes": {"0": 1.5}},
)


def test_written_and_read(tmp_path: Path) -> None:
    write_result(tmp_path / "r.json", RESULT)
    assert read_result(tmp_path / "r.json") == replace(RESULT, warnings=["few"])
    assert '"torch"' in (tmp_path / "r.json").read_text()


def test_a_number_that_is_none_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match="fid is nan; a result holds finite numbers only"):
        write_result(tmp_path / "r.json", replace(RESULT, metrics={"fid": float("nan")}))
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "kind": "distribution"}'])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(VarpiError, match="is not a result of `varpi evaluate`"):
        read_result(tmp_path / "r.json")


def test_results_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"format": 9}')
    with pytest.raises(VarpiError, match="has format 9; this varpi reads format 1: update varpi"):
        read_result(tmp_path / "r.json")


def test_differences_in_how_samples_were_made_are_told() -> None:
    other = replace(RESULT, sampling={"guidance_scale": 1.75, "seed": 0}, samples={**RESULT.samples, "count": 10_000})
    assert differences({"base": RESULT, "tuned": other}) == [
        "samples.count: base 50000, tuned 10000",
        "sampling.guidance_scale: base 1.0, tuned 1.75",
    ]
    moved = replace(RESULT, reference={"source": "there.npz", "sha256": "2"}, evaluator={"features": "inception"})
    assert differences({"base": RESULT, "tuned": moved}) == []  # where a file lies, and what computes, is no difference
    assert differences({"base": RESULT, "tuned": replace(RESULT, reference=None)}) == []  # that needed none


def with_statistics(**statistics: str) -> Result:
    return replace(RESULT, reference={"sha256": "2", "statistics": statistics})


def test_of_statistics_those_of_shared_metrics_are_compared() -> None:
    base, tuned = with_statistics(fid="stored", sfid="computed"), with_statistics(fid="stored")
    alone = replace(RESULT, reference=None)
    assert differences({"base": base, "tuned": tuned}) == differences({"tuned": tuned, "base": base}) == []
    with pytest.raises(VarpiError, match=r"base and tuned have another reference \(statistics\)"):
        differences({"alone": alone, "base": base, "tuned": with_statistics(fid="computed")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": {"sha256": "3"}}, r"base and tuned have another reference \(sha256\): their numbers do not"),
        ({"reference": {}}, r"base and tuned have another reference \(sha256\)"),
        ({"evaluator": {"features": "dinov2"}}, r"base and tuned have another evaluator \(features\)"),
        ({"kind": "text"}, "base is a distribution result and tuned a text one: not to be compared"),
    ],
)
def test_what_does_not_compare_is_refused(change: dict, message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        differences({"base": RESULT, "tuned": replace(RESULT, **change)})
