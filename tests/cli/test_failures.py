"""What `main` makes of failures: one line, an exit code that tells kinds apart, no control characters."""

import logging
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import varpi.studies.demo
from varpi.cli.main import main
from varpi.errors import Stopped, VarpiError, printable


def outcome(raises: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """What `varpi demo` returns and says when its work ends so."""

    def work(*_: Any, **__: Any) -> None:
        if isinstance(raises, BaseException):
            raise raises
        raises()

    monkeypatch.setattr(varpi.studies.demo, "demo", work)
    code = main(["demo"])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (VarpiError("a: wrong"), 2, "a: wrong\n"),
        (VarpiError("a: wrong", "b: wrong too"), 2, "a: wrong\nb: wrong too\n"),
        (VarpiError("a\nb\x1b[2J\udcff: no image"), 2, "a\\nb\\x1b[2J\\udcff: no image\n"),
        (FileNotFoundError(2, "No such file or directory", "x\ry"), 2, "x\\ry: No such file or directory\n"),
        (Stopped(signal.SIGTERM, "stopped at step 3 of 9, saved"), 143, "stopped at step 3 of 9, saved\n"),
        (Stopped(signal.SIGINT, "stopped at step 3 of 9, saved"), 130, "stopped at step 3 of 9, saved\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_line_and_exit_code(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(error, monkeypatch, capsys) == (code, f"varpi demo: {said}")


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(2**55),
        lambda: np.empty(2**55),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has …"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_says_what_to_lower(
    work: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = outcome(work, monkeypatch, capsys)
    assert code == 2
    assert said.startswith("varpi demo: out of memory; set --samples lower (")
    assert said.count("\n") == 1


def endless(depth: int = 0) -> int:
    return endless(depth + 1) + 1


@pytest.mark.parametrize(
    ("work", "name"), [(lambda: {}["\x1b\n" * 999], "KeyError"), (endless, "RecursionError"), (lambda: 1 / 0, "Zero")]
)
def test_an_unknown_exception_is_a_bug_with_its_trace_in_a_file(
    work: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, said = outcome(work, monkeypatch, capsys)
    (trace,) = tmp_path.iterdir()
    assert code == 1
    assert said.startswith(f"varpi demo: a bug in varpi ({name}")
    assert said.endswith(f"; please report it with the trace in {trace}\n")
    assert said.count("\n") == 1
    assert len(said) < 500
    assert "\x1b" not in said
    text = trace.read_text()
    assert text.startswith(f"varpi demo\nvarpi {varpi.__version__}, python {sys.version.split()[0]} on ")
    assert "Traceback (most recent call last)" in text
    assert f"in {'endless' if work is endless else '<lambda>'}" in text


def test_nowhere_to_write_the_trace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/dev/null/nothing")
    code, said = outcome(ZeroDivisionError("no"), monkeypatch, capsys)
    assert code == 1
    assert said.startswith("Traceback (most recent call last)")
    assert said.endswith("varpi demo: a bug in varpi (ZeroDivisionError: no); the trace is above; please report it\n")


def test_printable() -> None:
    assert printable("Fréchet distance π of a b.png") == "Fréchet distance π of a b.png"
    assert printable("a\tb\x07\x7f\u202e\u2028") == "a\\tb\\x07\\x7f\\u202e\\u2028"


def test_warnings_are_printable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])

    def work() -> None:
        logging.getLogger("varpi").warning("skipped a\rb")
        raise VarpiError("no more")

    assert outcome(work, monkeypatch, capsys)[1] == "WARNING: skipped a\\rb\nvarpi demo: no more\n"
