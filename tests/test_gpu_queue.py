"""The commands that wait for a GPU, and those of the benchmarks' page, are ones that the scripts take."""

import argparse
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
    scripts = {f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py")} - {"benchmarks/common.py"}
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
