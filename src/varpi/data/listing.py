"""Which files below a directory are images."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from varpi.data.images import has_image_suffix
from varpi.data.left_out import LeftOut
from varpi.errors import VarpiError

NOT_NAMED = "not named as images are"
NO_FILE = "no regular file, or not there"
AGAIN = "a directory that was visited already"


def list_images(
    root: Path, left_out: LeftOut, *, seen: Iterable[Path] = (), expected: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Every file below a directory that is named as images are, sorted by directory and then by name.

    Links are followed, but each directory is entered once, and those of `seen` not at all; pipes, sockets and devices
    are no images whatever their names. Names that begin with a dot are passed over in silence.

    left_out: where everything else is counted, but for names that are `expected`.

    Raises:
        VarpiError: a directory cannot be listed.
    """
    visited = {_identity(path) for path in seen}
    found: list[str] = []
    waiting = [str(root)]
    while waiting:
        directory = waiting.pop()
        identity = _identity(directory)
        if identity in visited:
            left_out.add(AGAIN, directory)
            continue
        visited.add(identity)
        for entry in _entries(directory):
            if expected(entry.name):
                continue
            if _holds(entry.is_dir):
                waiting.append(entry.path)
            elif not has_image_suffix(entry.name):
                left_out.add(NOT_NAMED, entry.path)
            elif not _holds(entry.is_file):
                left_out.add(NO_FILE, entry.path)
            else:
                found.append(entry.path)
    return sorted(found, key=os.path.split)


def directories(root: Path) -> list[str]:
    """Names of the directories in `root`, sorted, but for those that begin with a dot; errors as in `list_images`."""
    return sorted(entry.name for entry in _entries(root) if _holds(entry.is_dir))


def _entries(directory: str | Path) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(directory) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise VarpiError(f"{directory}: cannot be listed ({error.strerror})") from error


def _holds(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # a link to itself
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise VarpiError(f"{path}: cannot be listed ({error.strerror})") from error
    return found.st_dev, found.st_ino
