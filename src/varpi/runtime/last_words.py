"""What several processes have to say, each thing once; and how those that fail end together.

A mistake of the user fails all processes alike, at nearly the same time; and torchrun ends the others by SIGTERM once
one is gone, so that a line left to a chosen one might never be printed. Those of one machine tell each other by the
directory that torchrun keeps for their error files, which is new for every start; there need be no process group.
"""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_WAIT = 10.0
"""Seconds for which a process that failed waits for the others of its machine to fail too."""


def first_to_say(text: str) -> bool:
    """Whether none of the processes that torchrun started on this machine has said `text` before; True without it."""
    own = _own_folder()
    return own is None or _leave(own.parent / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}")


@contextmanager
def last_words(text: str) -> Iterator[bool]:
    """Whether this process, which fails, is the `first_to_say` why.

    In the end it waits until all of them have come to this, `LONGEST_WAIT` at most, and heeds no SIGTERM or SIGINT any
    more: so each exits with its own code.
    """
    own = _own_folder()
    try:
        yield first_to_say(text)
    finally:
        if own is not None:
            _leave(own / "failed")
            _end_together(own.parent)


def _own_folder() -> Path | None:
    reserved = os.environ.get("TORCHELASTIC_ERROR_FILE")  # ATTEMPT/LOCAL_RANK/error.json
    return Path(reserved).parent if reserved else None


def _end_together(attempt: Path) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    everyone, deadline = int(os.environ["LOCAL_WORLD_SIZE"]), time.monotonic() + LONGEST_WAIT
    while len([*attempt.glob("*/failed")]) < everyone and time.monotonic() < deadline:
        time.sleep(0.05)


def _leave(mark: Path) -> bool:
    """Leave a mark; whether nobody has before."""
    try:
        mark.open("x").close()
    except FileExistsError:
        return False
    except OSError:  # better said twice than not at all
        return True
    return True
