"""Files of prompts to sample from and to judge by: plain text, JSON lines, DrawBench, PartiPrompts, GenEval."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from varpi.errors import VarpiError
from varpi.runtime.files import line as line_of
from varpi.runtime.files import read_text

KEYS = ("prompt", "text", "Prompt", "caption")
GENEVAL_TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
GENEVAL_RELATIONS = ("left of", "right of", "above", "below")


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a file, in its order. Its name's ending tells the form:

    - `.jsonl`: a JSON object a line, with one of `KEYS` (GenEval's metadata is such a file);
    - `.json`: a list of strings or of such objects, or of conversations (DrawBench as AR-GRPO has it: 1000 rows of 200
      prompts); a prompt that comes again is left out;
    - `.tsv`: a table with a column "Prompt", unquoted (PartiPrompts);
    - anything else: a prompt a line.

    Blank lines are passed over. Raises VarpiError for a file that cannot be read or holds none, or a line without one.
    """
    path = Path(path).expanduser()
    match path.suffix:
        case ".jsonl":
            prompts = [prompt_in(record, where) for record, where in _json_lines(path)]
        case ".json":
            prompts = _json_rows(path)
        case ".tsv":
            prompts = _table(path)
        case _:
            prompts = [line.strip() for line in _read(path).split("\n") if line.strip()]
    if not prompts:
        raise VarpiError(f"{path}: holds no prompt")
    return prompts


def prompt_in(record: Any, where: str) -> str:
    """The prompt of one JSON value: under one of `KEYS`, or what the human says first in a conversation.

    where: names the value in the message. Raises VarpiError when it has none.
    """
    if isinstance(record, Mapping):
        found = [record[key] for key in KEYS if key in record]
        if not found and isinstance(turns := record.get("conversations"), list) and turns:
            found = [turns[0].get("value")] if isinstance(turns[0], Mapping) else []
        if found and isinstance(found[0], str) and found[0].strip():
            return _whole(found[0], where)
    raise VarpiError(f"{where}: has no prompt; one of the keys {', '.join(KEYS)} must hold a sentence")


def _whole(text: str, where: str) -> str:
    if text != text.encode(errors="ignore").decode():  # JSON can hold half of a surrogate pair, tokenizers cannot
        raise VarpiError(f"{where}: the prompt holds half a character ({text!r:.60}); mend or leave out that line")
    return text


def read_geneval_metadata(path: str | Path) -> list[dict[str, Any]]:
    """The prompts of GenEval (Ghosh et al. 2023) with what an image of each must show, a JSON object a line.

    Each has `prompt`, `tag` (the task), `include`: [{"class", "count"[, "color"][, "position": [relation, index of an
    earlier one]]}], and perhaps `exclude`: [{"class", "count"}], which fails an image with that many. The official file
    is evaluation_metadata.jsonl, 553 lines. Raises VarpiError for a file or a line that is not so.
    """
    path = Path(path).expanduser()
    records = [_geneval_record(record, where) for record, where in _json_lines(path)]
    if not records:
        raise VarpiError(f"{path}: holds no prompt")
    return records


def _geneval_record(record: Any, where: str) -> dict[str, Any]:
    prompt_in(record, where)
    for key in ("prompt", "tag"):
        if not isinstance(record.get(key), str) or not record[key]:
            raise VarpiError(f"{where}: {key!r} is {record.get(key)!r}; GenEval's metadata has a string there")
    if not isinstance(record.get("include"), list) or not record["include"]:
        raise VarpiError(f"{where}: 'include' is {record.get('include')!r}; expected what the image must show")
    if not isinstance(record.get("exclude", []), list):
        raise VarpiError(f"{where}: 'exclude' is {record['exclude']!r}; expected a list")
    for key in ("include", "exclude"):
        for index, wanted in enumerate(record.get(key, [])):
            _check_wanted(wanted, index, f"{where}: {key}[{index}]")
    return record


def _check_wanted(wanted: Any, index: int, where: str) -> None:
    if not isinstance(wanted, Mapping) or not isinstance(wanted.get("class"), str):
        raise VarpiError(f"{where} is {wanted!r}; expected an object with 'class' and 'count'")
    count = wanted.get("count")
    if type(count) is not int or count < 1:  # not True, which is an int too
        raise VarpiError(f"{where}: 'count' is {count!r}; it must be a whole number of at least 1")
    if wanted.get("color", "red") not in GENEVAL_COLORS:
        raise VarpiError(f"{where}: 'color' is {wanted['color']!r}; it must be one of {', '.join(GENEVAL_COLORS)}")
    if "position" in wanted:
        match wanted["position"]:
            case [relation, int(target)] if relation in GENEVAL_RELATIONS and 0 <= target < index:
                pass
            case position:
                expected = f"one of {', '.join(GENEVAL_RELATIONS)} and the index of an earlier object"
                raise VarpiError(f"{where}: 'position' is {position!r}; expected {expected}")


def _read(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise VarpiError(f"{path}: cannot be read as a text file of prompts ({error})") from error


def _json_lines(path: Path) -> list[tuple[Any, str]]:
    """The JSON value of each line that is not blank, and where it stands."""
    values = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                values.append((json.loads(line), where))
            except (ValueError, RecursionError) as error:
                raise VarpiError(f"{where}: is not JSON ({line_of(error)})") from error
    return values


def _json_rows(path: Path) -> list[str]:
    text = _read(path)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VarpiError(f"{path}: is not JSON ({line_of(error)})") from error
    if not isinstance(rows, list):
        raise VarpiError(f"{path}: is a JSON {type(rows).__name__}; expected a list of prompts")
    prompts = (
        _whole(row, f"{path}, row {i}") if isinstance(row, str) and row.strip() else prompt_in(row, f"{path}, row {i}")
        for i, row in enumerate(rows)
    )
    return list(dict.fromkeys(prompts))


def _table(path: Path) -> list[str]:
    try:
        rows = list(csv.reader(_read(path).split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE))
    except csv.Error as error:
        raise VarpiError(f"{path}: cannot be read as a table ({error})") from error
    if not rows or "Prompt" not in rows[0]:
        raise VarpiError(f"{path}: its first line has no column Prompt, by which PartiPrompts names its prompts")
    column, prompts = rows[0].index("Prompt"), []
    for number, row in enumerate(rows[1:], 2):
        if any(cell.strip() for cell in row):
            if len(row) <= column or not row[column].strip():
                raise VarpiError(f"{path}, line {number}: has no prompt in its column Prompt")
            prompts.append(row[column].strip())
    return prompts
