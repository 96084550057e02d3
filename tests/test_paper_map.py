"""docs/paper_map.md names files, functions and tests: all of them exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = (ROOT / "src" / "varpi", ROOT / "tests")
NAMED = re.compile(r"`(?P<file>[\w/*-]+\.(?:py|yaml))?(?:::?(?P<name>\w[\w.]*))?`")


def test_what_the_map_names_exists() -> None:
    unknown, checked = [], 0
    for number, line in enumerate((ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8").splitlines(), 1):
        file = None
        for match in NAMED.finditer(line):
            file = match["file"] or file  # `:name` is of the file before it
            if file is None:
                continue
            texts = [path.read_text(encoding="utf-8") for place in PLACES for path in place.glob(file)]
            name = (match["name"] or "").rpartition(".")[2]
            defined = re.compile(rf"^\s*(def|class) {name}\b|^\s*{name}\b.* = ", re.MULTILINE)
            if not texts or (name and not any(defined.search(text) for text in texts)):
                unknown.append(f"line {number}: {match[0]} of {file}")
            checked += 1
    assert unknown == []
    assert checked > 100
