"""Inputs that showed faults once: written here, and taken from ../shared/cases where that lies beside the checkout."""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared" / "cases"
WHICH = ("own", "shared") if SHARED.is_dir() else ("own",)

TOO_LONG = ("a red cat", "moon", "the dog", "cat " * 2000)
"""The last is beyond the context of a small Janus."""
EMPTIED = ("a red cat", "<br/>", "漢字 漢字", "#123456", "free shipping")
"""Cleaning leaves nothing but of the first."""


def captioned(folder: Path, name: str, captions: Sequence[str]) -> Path:
    """A file of JSON lines with these captions, all of one image of 64 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (200, 30, 40)).save(folder / "x.png")
    lines = (json.dumps({"image_path": "x.png", "text": [caption]}) + "\n" for caption in captions)
    (folder / name).write_text("".join(lines))
    return folder / name


def caption_case(which: str, name: str, folder: Path) -> Path:
    """ "too-long.jsonl" or "empty-after-cleaning.jsonl", one of `WHICH`."""
    if which == "shared":
        return SHARED / "captions" / name
    return captioned(folder, name, TOO_LONG if name.startswith("too") else EMPTIED)
