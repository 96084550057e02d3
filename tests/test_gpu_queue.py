"""The commands that wait for a GPU, and those of the benchmarks' page, are ones that the scripts take."""

import argparse
import importlib
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "gpu_queue.md", ROOT / "benchmarks" / "README.md")
COMMANDS = [found for page in PAGES for found in re.findall(r"python (benchmarks/\w+\.py[^`\n]*)", page.read_text())]


class Parsed(Exception):
    """A script has understood its arguments, which is as far as it goes here."""


def test_every_script_is_there() -> None:
    helpers = {"common.py", "released.py"}
    scripts = {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py") if path.name not in helpers}
    assert {command.split()[0] for command in COMMANDS} == scripts


@pytest.mark.parametrize("command", COMMANDS)
def test_it_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser) -> None:
        raise Parsed(parse(parser))

    script, *arguments = shlex.split(command)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("script", sorted({command.split()[0] for command in COMMANDS}))
def test_no_result_replaces_anything_else(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    path = tmp_path / "a.json"
    monkeypatch.setattr(sys, "argv", [script, "--json", str(path)])
    path.write_text('{"mine": 1}')
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 2
    assert f"--json {path}: holds something else and is not replaced; choose another" in capsys.readouterr().err
    assert path.read_text() == '{"mine": 1}'
    path.unlink()
    common = importlib.import_module("common")
    for number in (1, 2):  # a result replaces a result
        assert common.parse(argparse.ArgumentParser()).json == path
        common.write_json(path, {"number": number, "machine": common.machine("cpu")})
    assert json.loads(path.read_text())["number"] == 2
