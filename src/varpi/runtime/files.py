"""Writing files so that a failure harms nothing: aside, flushed, renamed. Reading them so that nothing hangs."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from varpi.errors import VarpiError


def write_aside(
    path: str | os.PathLike[str], write: Callable[[Path], object], *, size: int = 0, sync: bool = True
) -> None:
    """Have `write` fill a file beside `path` that then takes its place, so that `path` is old or new, never half.

    size: how many bytes it will be, about, where that is known beforehand.
    sync: also after a power failure. Not for one of thousands of files: sync once, when all are written.

    Raises:
        VarpiError: it cannot be written, for instance for lack of space; `path` is as before.
    """
    path = Path(path)
    if path.is_dir():
        raise VarpiError(f"{path}: is a directory; give the name of a file")
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise VarpiError(f"{path}: no space left on the disk ({size:,} bytes needed, {free:,} free); not written")
        aside.touch()
        mode = aside.stat().st_mode  # what the user's umask says; safetensors would make the file private
        write(aside)
        aside.chmod(mode)
        if sync:
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        raise VarpiError(f"{path}: could not be written ({line(error)}); nothing was overwritten") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def clear_parts(paths: Iterable[Path]) -> None:
    """Remove what processes that were killed left of writing these files aside. None may be writing them now."""
    names: dict[Path, set[str]] = {}
    for path in paths:
        names.setdefault(path.parent, set()).add(path.name)
    for folder, own in names.items():
        for part in folder.glob(".*.part"):
            if re.fullmatch(r"\.(.*)\.\d+\.part", part.name, re.DOTALL) and part.name[1:].rsplit(".", 2)[0] in own:
                part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, *, sync: bool = True) -> None:
    """Replace a text file by way of `write_aside`."""
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"), sync=sync)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading; a pipe or a device would block, or have no end.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without O_NONBLOCK, to open may itself block
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file")
    return open(number, "rb")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text in a regular file, UTF-8, without the mark that some editors begin a file with.

    Raises:
        OSError: it cannot be read, or is something else. UnicodeDecodeError: it is no text.
    """
    with open_regular(path) as file:
        return io.TextIOWrapper(file, encoding="utf-8-sig").read()


def check_output(option: str, path: str | os.PathLike[str], *, marker: bytes | None = None) -> None:
    """See that writing an output will destroy nothing but an earlier output of its kind.

    option: what to call the path in errors. marker: what the first 4 KiB of every file of this kind hold; None: nothing
    that exists may be replaced.

    Raises:
        VarpiError: something else lies there.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if marker is None:
        raise VarpiError(f"{option} {path}: already exists; choose another")
    if path.is_dir():
        raise VarpiError(f"{option} {path}: is a directory; give the name of a file")
    try:
        with open_regular(path) as file:
            ours = marker in file.read(4096)
    except OSError as error:
        raise VarpiError(f"{option} {path}: is in the way ({error.strerror or error}); choose another") from error
    if not ours:
        raise VarpiError(f"{option} {path}: holds something else and is not replaced; choose another")


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. Raises VarpiError for one that cannot be read, is not JSON, or is nested too deeply."""
    try:
        with open_regular(path) as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise VarpiError(f"{path}: cannot be read as JSON ({line(error)})") from error


def line(error: BaseException) -> str:
    """An exception on one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
