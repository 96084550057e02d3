"""What is read as a file is one: a pipe or a device is refused, and at once, by every reader of text."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from varpi.data.prompts import read_geneval_metadata, read_prompts
from varpi.errors import VarpiError
from varpi.evaluation.detections import read_detections
from varpi.evaluation.result import read_result
from varpi.recipe import load_recipe
from varpi.runtime.files import read_text


@pytest.mark.parametrize(
    "read", [read_prompts, read_geneval_metadata, read_result, read_detections, load_recipe], ids=lambda f: f.__name__
)
@pytest.mark.timeout(20)
def test_pipes_and_devices_are_refused(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(VarpiError, match=rf"{name}: .*(not a|no) regular file"):
            read(tmp_path / name)


@pytest.mark.parametrize("read", [read_result, read_detections, read_geneval_metadata], ids=lambda f: f.__name__)
def test_json_nested_without_end_is_refused(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    with pytest.raises(VarpiError, match=r"deep\.json"):
        read(path)


def test_text_is_read_without_its_mark_and_with_one_kind_of_line_end(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("\ufeffä\r\nb\n".encode())
    assert read_text(tmp_path / "text") == "ä\nb\n"
    (tmp_path / "latin").write_bytes(b"\xe4")
    with pytest.raises(UnicodeDecodeError):
        read_text(tmp_path / "latin")
