"""Pictures and captions of your own: from a table to what `varpi train` reads.

    python examples/own_data.py captions.csv data/mine
    varpi train janus-pro-1b --output runs/mine --set data.source=data/mine --set data.stream=false \
        --set data.caption_column=null --set validation.every=25

The table has the columns `file` (relative to the table) and `caption`. Every tenth row is held out for validation.
"""

import csv
import json
import sys
from pathlib import Path


def convert(table: Path, folder: Path) -> None:
    """Write folder/train/captions.jsonl and folder/validation/captions.jsonl, a picture a line."""
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for split, chosen in (
        ("train", [row for i, row in enumerate(rows) if i % 10]),
        ("validation", rows[::10]),
    ):
        (folder / split).mkdir(parents=True, exist_ok=True)
        with (folder / split / "captions.jsonl").open("w", encoding="utf-8") as file:
            for row in chosen:
                line = {"image_path": str((table.parent / row["file"]).resolve()), "text": [row["caption"]]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
