"""Captioned images in tar shards of the WebDataset form, as img2dataset writes them and LAION-COCO is handed about.

A sample is all members of a shard whose names agree up to the first dot of the last part: `000120003.jpg`,
`000120003.json`, `000120003.txt`.
"""

import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from varpi.data.captions import CAPTION_FIELDS
from varpi.data.dataset import NO_CAPTION, NO_IMAGE, BadImage, Dropped, Item
from varpi.data.images import SUFFIXES
from varpi.data.jsonl import check_names, find_caption, find_twins, parse_record, shown
from varpi.data.left_out import LeftOut
from varpi.data.transforms import load_image
from varpi.errors import VarpiError
from varpi.runtime.files import line, open_regular

logger = logging.getLogger(__name__)

_KINDS = {suffix: "image" for suffix in SUFFIXES} | {".json": "json", ".txt": "txt"}
# Where each part of a sample begins in the shard, in bytes, and its length; both 0 for a part that is not there
_PLACES = [(f"{kind}_{field}", np.int64) for kind in ("image", "json", "txt") for field in ("start", "size")]
_MEMBER = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)(?P<suffix>\.[^/]*)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_OPEN_FILES = 256
# Bounds of what a member may make us hold: tar itself has none, and one long name widens the index of all the others
_LONGEST_NAME = 4096
_LONGEST_HEADER = 1 << 20
_LARGEST_TEXT = 1 << 24
_LARGEST_IMAGE = 1 << 30


class TarShards:
    """Random access to the images and captions of tar shards, in the order of the shards and of their members.

    The caption is the first of `caption_fields` in the sample's JSON, or else its text file. Samples without an image
    are no items. The shards are indexed when they are opened; they must not change afterwards.

    Args:
        paths: the shards.
        image_size: side of the square images, in pixels.
        caption_fields: where the JSON has its caption, in order of preference; see `pick_caption`.
        min_side: the shorter side that an image must have at least, in pixels.

    Raises:
        VarpiError: a shard is missing, compressed, damaged or cut short, or none holds an image.
    """

    num_classes = None
    class_names = None

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        image_size: int,
        caption_fields: Sequence[str] = CAPTION_FIELDS,
        min_side: int = 0,
    ) -> None:
        self._paths = [str(path) for path in paths]
        self._image_size = image_size
        self._fields = tuple(caption_fields)
        self._min_side = min_side
        digest = hashlib.sha256()
        self._shards: list[np.ndarray] = []  # one structured array each: worker processes share its pages
        left_out, samples = LeftOut(), 0
        for path in self._paths:
            index, members, without_image = _index(path)
            self._shards.append(index)
            samples += len(index) + len(without_image)
            for name in without_image:
                left_out.add(NO_IMAGE, f"{path}/{name}")
            digest.update(f"{os.path.basename(path)}\0{os.path.getsize(path)}\0{members}\0".encode())
        left_out.say(shown(self._paths), samples, "samples")
        self._ends = np.cumsum([len(index) for index in self._shards])
        self._twins = find_twins(self._paths)
        self._handle = lru_cache(_OPEN_FILES)(_Handle)
        if len(self) == 0:
            raise VarpiError(f"{shown(self._paths)}: no images in the tar shards; known are {' '.join(SUFFIXES)}")
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def __getitem__(self, index: int) -> Item:
        caption = self.caption(index)
        shard, entry = self._place(index)
        data = self._read(shard, entry, "image")
        return Item(load_image(data, self.name(index), self._image_size, min_side=self._min_side), caption)

    def caption(self, index: int) -> str:
        shard, entry = self._place(index)
        record, text = (self._read(shard, entry, kind) if entry[f"{kind}_start"] else None for kind in ("json", "txt"))
        return sample_caption(record, text, self._fields, self.name(index))

    def name(self, index: int) -> str:
        shard, entry = self._place(index)
        return f"{self._paths[shard]}/{os.fsdecode(entry['key'])}"

    def key(self, index: int) -> str:
        """<name of the shard>/<name of the sample>.

        Raises:
            VarpiError: shards of one name in different folders; their features would lie in the same place.
        """
        check_names(self._twins)
        shard, entry = self._place(index)
        return f"{Path(self._paths[shard]).stem}/{os.fsdecode(entry['key'])}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_handle": lru_cache(_OPEN_FILES)(_Handle)}

    def _read(self, shard: int, entry: Any, kind: str) -> bytes:
        path, size = self._paths[shard], int(entry[f"{kind}_size"])
        _check_size(size, kind, f"{path}/{os.fsdecode(entry['key'])}")
        try:
            data = os.pread(self._handle(path).number, size, int(entry[f"{kind}_start"]))
        except OSError as error:
            raise BadImage(f"{path}: cannot be read ({error.strerror})") from error
        if len(data) < size:
            raise BadImage(f"{path}: shorter than when it was opened")
        return data

    def _place(self, index: int) -> tuple[int, Any]:
        """The number of the shard, and the sample's entry in its index."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, self._shards[shard][index - self._ends[shard]]


def sample_caption(record: bytes | None, text: bytes | None, fields: Sequence[str], name: str) -> str:
    """The caption of a sample, from its JSON or else its text file.

    Raises:
        Dropped: there is none that can be used.
    """
    reasons = []
    if record is not None:
        parsed = parse_record(record)
        if parsed is not None and (caption := find_caption(parsed, fields)) is not None:
            return caption
        reasons.append("damaged JSON" if parsed is None else "no usable caption in its JSON")
    if text is not None:
        try:
            caption = text.decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            reasons.append("its text is not UTF-8")
        else:
            if caption:
                return caption
            reasons.append("its text is blank")
    raise Dropped(f"{name}: {', '.join(reasons) or 'neither .json nor .txt beside the image'}", NO_CAPTION)


def read_samples(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard, read from its beginning to its end: name, and the parts "image", "json", "txt" it has.

    The members of a sample must follow one another.

    Raises:
        VarpiError: as `TarShards`, once the damaged place is reached.
    """
    with _opened(path) as file:
        for key, members in groupby(_members(file, path), key=lambda member: member[0]):
            parts: dict[str, bytes] = {}
            for _, kind, start, size in members:
                if size <= _largest(kind):
                    file.seek(start)
                    parts.setdefault(kind, file.read(size))
                else:
                    logger.warning("%s/%s: its %s has %d bytes and is left out", path, key, kind, size)
            yield f"{path}/{key}", parts


def check_shard(path: str) -> None:
    """Whether a shard looks like a whole tar archive, by its first and last bytes.

    Raises:
        VarpiError: it does not.
    """
    with _opened(path) as file:
        file.seek(max(0, os.path.getsize(path) - 2 * tarfile.BLOCKSIZE))
        if any(file.read()):
            raise VarpiError(f"{path}: does not end as a tar archive does; it was cut short: fetch it again")


def _index(path: str) -> tuple[np.ndarray, int, list[str]]:
    """A structured array of the samples with an image, the number of members of the shard, the samples without one."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    count = 0
    with _opened(path) as file:
        for key, kind, start, size in _members(file, path):
            samples.setdefault(key, {}).setdefault(kind, (start, size))
            count += 1
    entries = [
        (os.fsencode(key), *parts["image"], *parts.get("json", (0, 0)), *parts.get("txt", (0, 0)))
        for key, parts in samples.items()
        if "image" in parts
    ]
    width = max((len(entry[0]) for entry in entries), default=1)
    without_image = [key for key, parts in samples.items() if "image" not in parts]
    return np.array(entries, dtype=[("key", f"S{width}"), *_PLACES]), count, without_image


def _members(file: BinaryIO, path: str) -> Iterator[tuple[str, str, int, int]]:
    """(key, kind, start, size) of the members that belong to samples. The archive must be whole to its end."""
    size = os.fstat(file.fileno()).st_size
    last = None
    headers: Any = _Headers(file)
    try:
        archive: Any = tarfile.open(fileobj=headers, mode="r:")  # noqa: SIM115 - closing it would do nothing
    except Exception as error:  # it reads the first header at once
        raise VarpiError(_damaged(path, 0, None, line(error))) from error
    with archive:
        while True:
            try:
                member = archive.next()
            except Exception as error:  # tarfile has many words for a broken header
                raise VarpiError(_damaged(path, archive.offset, last, line(error))) from error
            if member is None:
                break
            archive.members.clear()  # it would keep every one
            if len(os.fsencode(member.name)) > _LONGEST_NAME:
                raise VarpiError(_damaged(path, member.offset, last, f"a name of {len(member.name)} characters"))
            if member.size < 0 or archive.offset <= member.offset:
                raise VarpiError(_damaged(path, member.offset, last, f"{member.name} has a negative size"))
            if member.offset_data + member.size > size:
                raise VarpiError(_damaged(path, member.offset_data, last, f"{member.name} goes beyond the file's end"))
            last = member.name
            if member.isreg() and not member.issparse() and (match := _MEMBER.fullmatch(member.name)) is not None:
                kind = _KINDS.get(match["suffix"].lower())
                if kind is not None:
                    yield _inside(match["key"]), kind, member.offset_data, member.size
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
    if not end:
        raise VarpiError(
            f"{path}: stops after {last or 'nothing'} without the mark that ends a tar archive; fetch it again (if it "
            f"is known to be whole: truncate -s +1024 {path})"
        )
    if any(end):
        raise VarpiError(_damaged(path, archive.offset, last, "no tar header"))


class _Headers:
    """A file for tarfile, which reads only headers from it: none that is larger than any honest one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.name, self.mode = file.name, "rb"

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _largest(kind: str) -> int:
    return _LARGEST_IMAGE if kind == "image" else _LARGEST_TEXT


def _check_size(size: int, kind: str, name: str) -> None:
    if size > _largest(kind):
        raise BadImage(f"{name}: its {kind} has {size} bytes; at most {_largest(kind)} are read")


def _inside(key: str) -> str:
    """A member's name that leads nowhere out of a folder. `tar` writes "./a" as well."""
    return "/".join(part for part in key.split("/") if part not in ("", ".", ".."))


def _damaged(path: str, offset: int, last: str | None, reason: str) -> str:
    whole = f"the last whole member is {last}" if last else "no member is whole"
    return f"{path}: cut short or damaged at byte {offset} ({reason}); {whole}: fetch the shard again, or leave it out"


def _opened(path: str) -> BinaryIO:
    """A shard, open for reading, once its first bytes are those of a plain tar archive."""
    try:
        file = open_regular(path)
        begin = file.read(tarfile.BLOCKSIZE)
    except OSError as error:
        raise VarpiError(f"{path}: cannot be read ({error.strerror})") from error
    for magic, name in _COMPRESSED.items():
        if begin.startswith(magic):
            file.close()
            raise VarpiError(f"{path}: compressed with {name}, which allows no random access; decompress it first")
    try:
        tarfile.TarInfo.frombuf(begin, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError as error:
        if begin != bytes(tarfile.BLOCKSIZE):  # that is an archive without members
            file.close()
            raise VarpiError(f"{path}: not a tar archive ({error})") from error
    file.seek(0)
    return file


class _Handle:
    """A file that is closed when nothing holds it any more. Reads name their place: processes may share one."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)
