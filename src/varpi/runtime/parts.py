"""Work that processes share by files: each makes its parts, the main one waits until all are there.

There is no process group and no barrier, so that none can time out. A part is there when its files are, each of which
appears whole; what an interruption leaves is kept, and a record written before the first part says what was asked for.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from varpi.errors import VarpiError
from varpi.runtime.files import line, write_text
from varpi.runtime.processes import World

T = TypeVar("T")

PATIENCE = 3600.0
"""Seconds for which a process waits for one part of another's before it takes that one for dead."""
_LONGEST_NAP = 1.0
_log = logging.getLogger(__name__)


def claim(
    path: Path, asked: Mapping[str, Any], world: World, *, remedy: str, untouched: bool, done: Callable[[], bool]
) -> None:
    """Record at `path` what is asked for, or find that it is what was asked before. The main process writes it.

    asked: what decides the parts, as JSON. untouched: no part is there yet, so that another record is simply replaced.
    done: whether all is finished, on which the processes that wait for the record do not insist on it.

    Raises VarpiError, with the `remedy`, when the record says something else.
    """
    if world.is_main:
        if (other := difference(path, asked)) and not untouched:
            raise VarpiError(f"{path}: {other}; {remedy}")
        write_text(path, json.dumps(asked))
    else:
        wait(lambda: (path.is_file() and not difference(path, asked)) or done() or None, f"{path}")


def difference(theirs: Path | Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """The first field in which a record differs from `ours`, in words; None when none does.

    theirs: the record, or its file of JSON; no file is no difference. Raises VarpiError when it cannot be read.
    """
    if isinstance(theirs, Path):
        try:
            record = json.loads(theirs.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise VarpiError(f"{theirs}: cannot be read ({line(error)}); remove it, or choose another place") from error
        if not isinstance(record, dict):
            return f"is a JSON {type(record).__name__} instead of a record"
        theirs = record
    for name, value in json.loads(json.dumps(ours)).items():
        if name not in theirs or theirs[name] != value:
            return f"{name} is {_short(theirs.get(name))}, here it is {_short(value)}"
    return None


def wait(look: Callable[[], T | None], what: str) -> T:
    """What `look` returns once it is not None; it is asked again and again, and a minute of that is said.

    Raises VarpiError after `PATIENCE` seconds of nothing.
    """
    begun, nap, said = time.monotonic(), 0.02, False
    while (found := look()) is None:
        waited = time.monotonic() - begun
        if waited > 60 and not said:
            _log.warning("waiting for another process to make %s", what)
            said = True
        if waited > PATIENCE:
            raise VarpiError(
                f"{what}: not there after {PATIENCE:.0f} seconds; another process that was to make it is slow or dead. "
                "Run the same command again: what is there is kept"
            )
        time.sleep(nap)
        nap = min(2 * nap, _LONGEST_NAP)
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
