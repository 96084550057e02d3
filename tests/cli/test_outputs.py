"""No output replaces anything but an earlier output of its own kind, in any command."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from training_runs import contents

from varpi.cli.main import main
from varpi.errors import VarpiError
from varpi.evaluation.detections import _Cache
from varpi.evaluation.result import MARKER, Result, read_result, write_result
from varpi.runtime.files import check_output


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with samples, a result, a page, a run's recipe and a tokenizer, as a user has them side by side."""
    folder = tmp_path_factory.mktemp("work")
    tiny.make(folder)
    assert main(["sample", "digits", "--tokenizer", "digits", "--per-class", "2", "--output", str(folder / "s")]) == 0
    write_result(folder / "base.json", Result("text", {"clip_score": 0.3}, {}, None, None, {}))
    (folder / "notes.html").write_text("<p>mine</p>")
    (folder / "metrics.json").write_text(json.dumps({"kind": "mine", "format": 1}))
    return folder


def refused(work: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    before = contents(work)
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.count("\n") == 1
    assert contents(work) == before
    return said


ELSE = "holds something else and is not replaced; choose another"
EVALUATE = ("evaluate", "s", "--features", "digits")
COMPARE = ("report", "--device", "cpu", "--compare", "a=base.json", "b=base.json")


@pytest.mark.parametrize(
    ("command", "option", "victims"),
    [
        (EVALUATE, "--json", ("s/samples.npz", "s/sample.json", "va_pi.yaml", "metrics.json", "notes.html")),
        (
            (*EVALUATE, "--kind", "geneval"),
            "--save-detections",
            ("s/samples.npz", "s/sample.json", "base.json", "metrics.json"),
        ),
        (COMPARE, "--output", ("base.json", "va_pi.yaml", "notes.html", "generator.safetensors")),
        (
            ("encode", "images", "images", "--image-size", "16", "--tokenizer", "tokenizer.safetensors"),
            "--output",
            ("tokenizer.safetensors", "generator.safetensors", "base.json"),
        ),
        (
            ("export", "generator.safetensors"),
            "--output",
            ("generator.safetensors", "tokenizer.safetensors", "notes.html", "images"),
        ),
        (
            ("sample", "generator.safetensors", "--tokenizer", "tokenizer.safetensors", "--count", "1"),
            "--output",
            ("generator.safetensors", "images", "s/samples.npz"),
        ),
        (("train", "va_pi.yaml", "--device", "cpu"), "--output", ("va_pi.yaml", "images", "s")),
        (("demo",), "--output", ("va_pi.yaml", "images", "s")),
    ],
    ids=["evaluate", "detections", "report", "encode", "export", "sample", "train", "demo"],
)
def test_an_input_is_not_replaced(
    work: Path,
    command: tuple[str, ...],
    option: str,
    victims: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(work)
    for victim in victims:
        said = refused(work, capsys, *command, option, victim)
        assert victim in said
        assert "choose another" in said, said


def test_a_result_replaces_a_result(work: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    for seed in (1, 2):
        write_result(output, Result("text", {"clip_score": seed}, {}, None, None, {}))
        check_output("--json", output, marker=MARKER)
        assert read_result(output).metrics == {"clip_score": seed}
    arguments = ["evaluate", str(work / "s"), "--features", "digits", "--metrics", "fid", "--json", str(output)]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert read_result(output).kind == "distribution"


def test_a_page_replaces_a_page(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    page = tmp_path / "page.html"
    for title in ("a", "b"):
        assert main([*comparison(title), "--output", str(page)]) == 0
        assert f">{title}" in page.read_text()


def comparison(name: str) -> list[str]:
    return ["report", "--device", "cpu", "--compare", f"{name}=base.json", "other=base.json"]


def test_the_page_of_a_run_is_not_written_over_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").write_text("<p>mine</p>")
    assert ELSE in refused(tmp_path, capsys, "report", tmp_path, "--device", "cpu")
    said = refused(tmp_path, capsys, "report", tmp_path, "--device", "cpu", "--output", tmp_path / "x.html")
    assert "--output is for --compare" in said


def test_check_output(tmp_path: Path) -> None:
    path = tmp_path / "x"
    check_output("--json", path, marker=b"ours")  # nothing there
    path.write_bytes(b"it is ours")
    check_output("--json", path, marker=b"ours")
    for content in (b"", b"mine", b" " * 4096 + b"ours"):
        path.write_bytes(content)
        with pytest.raises(VarpiError, match=ELSE):
            check_output("--json", path, marker=b"ours")
    with pytest.raises(VarpiError, match=r"--json .*x: already exists; choose another"):
        check_output("--json", path)
    with pytest.raises(VarpiError, match="is a directory; give the name of a file"):
        check_output("--json", tmp_path, marker=b"ours")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in (tmp_path / "pipe", tmp_path / "dangling", Path("/dev/null")):
        with pytest.raises(VarpiError, match=f"{name}: is in the way"):
            check_output("--json", name, marker=b"ours")


def test_a_file_that_is_no_cache_of_detections_is_left_as_it_is(work: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "detections.jsonl"
    for content in ('{"a": 1}\n{"image": "mine"}', "mine"):
        theirs.write_text(content)
        with pytest.raises(VarpiError, match=r"detections\.jsonl: "):
            _Cache.open(theirs, SimpleNamespace(identity={"name": "d"}), None)  # pyright: ignore[reportArgumentType]
        assert theirs.read_text() == content
