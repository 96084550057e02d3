"""Files of prompts to sample from."""

import json
from pathlib import Path

from varpi.errors import VarpiError

KEYS = ("prompt", "text", "Prompt", "caption")


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file: one a line, or JSON lines with one of `KEYS` (GenEval's metadata is such a file).

    Blank lines are passed over. Raises VarpiError for a file that cannot be read or holds none, or a line without one.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise VarpiError(f"{path}: cannot be read as a text file of prompts ({error})") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompts.append(_prompt(line, f"{path}, line {number}") if path.suffix == ".jsonl" else line.strip())
    if not prompts:
        raise VarpiError(f"{path}: holds no prompt")
    return prompts


def _prompt(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise VarpiError(f"{where}: is not JSON ({error})") from error
    found = [record[key] for key in KEYS if key in record] if isinstance(record, dict) else []
    if not found or not isinstance(found[0], str) or not found[0].strip():
        raise VarpiError(f"{where}: has no prompt; one of the keys {', '.join(KEYS)} must hold a sentence")
    return found[0]
