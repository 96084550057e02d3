"""numpy's files, read without trust: a header is held against what the file holds before memory is taken."""

import io
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from varpi.errors import VarpiError
from varpi.runtime.files import line, open_regular

MOST_INFLATION = 200
"""How many times its packed size an array may have, when it is larger than `ALWAYS_READ`; photographs have 1 to 3."""
ALWAYS_READ = 1 << 28
_LONGEST_HEADER = 10_000


class Header(NamedTuple):
    """What an array is, before it is read."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    data: int
    """Where its bytes begin."""


def read_header(file: IO[bytes], size: int) -> Header:
    """The header of an `.npy` file of `size` bytes, and no more than that.

    Raises:
        ValueError: it is none, claims another number of bytes than there are, or Python objects.
    """
    begin = file.read(8)
    version = np.lib.format.read_magic(io.BytesIO(begin))
    length = file.read(2 if version == (1, 0) else 4)
    if (stated := int.from_bytes(length, "little")) > _LONGEST_HEADER:
        raise ValueError(f"its header has {stated} bytes")
    whole = io.BytesIO(length + file.read(stated))
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(whole)
    data = 8 + len(whole.getvalue())
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not read")
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != size - data:
        raise ValueError(f"its header claims {dtype} {shape}, which are not the {size - data} bytes that it holds")
    return Header(shape, fortran_order, dtype, data)


@contextmanager
def open_npz(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """An `.npz` file, for its arrays. Whatever goes wrong inside becomes a VarpiError that names the file."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            yield archive
    except VarpiError:
        raise
    except Exception as error:  # zipfile and the decompressors have many words for a damaged file
        raise VarpiError(f"{path}: cannot be read as .npz ({line(error)})") from error


def array_names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist()]


@contextmanager
def open_array(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], Header]]:
    """One array of an `.npz`: its file, which stands where the data begin, and its header.

    Raises:
        ValueError: the header is not true, or the array is packed as no honest one is.
    """
    found = archive.getinfo(f"{name}.npy")
    if found.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed in a way that numpy has not")
    packed = min(found.compress_size, os.fstat(archive.fp.fileno()).st_size) if archive.fp else 0
    if found.file_size > max(MOST_INFLATION * packed, ALWAYS_READ):
        raise ValueError(f"{name} claims to unpack from {packed} bytes to {found.file_size}")
    with archive.open(found) as member:
        yield member, read_header(member, found.file_size)


def read_arrays(path: str | os.PathLike[str], names: Sequence[str], most_bytes: int) -> dict[str, np.ndarray]:
    """Those arrays of an `.npz` that it has among `names`; none of more than `most_bytes`.

    Raises:
        VarpiError: the file cannot be read, or an array is too large.
    """
    arrays: dict[str, np.ndarray] = {}
    with open_npz(path) as archive:
        for name in [name for name in names if name in array_names(archive)]:
            with open_array(archive, name) as (member, header):
                arrays[name] = _read(member, header, most_bytes)
    return arrays


def read_npy(path: Path, most_bytes: int) -> np.ndarray:
    """The array of an `.npy` file. Raises OSError or ValueError."""
    with open_regular(path) as file:
        return _read(file, read_header(file, os.fstat(file.fileno()).st_size), most_bytes)


def _read(file: IO[bytes], header: Header, most_bytes: int) -> np.ndarray:
    size = math.prod(header.shape) * header.dtype.itemsize
    if size > most_bytes:
        raise ValueError(f"{header.dtype} {header.shape} are {size} bytes; at most {most_bytes} are read here")
    array = np.frombuffer(file.read(size), header.dtype)
    return array.reshape(header.shape, order="F" if header.fortran_order else "C").copy()
