"""Captioned images listed in JSON lines, the layout that LlamaGen trains its text-to-image models from."""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from varpi.data.captions import CAPTION_FIELDS, pick_caption
from varpi.data.dataset import NO_CAPTION, NO_IMAGE, Dropped, Item
from varpi.data.transforms import load_image
from varpi.errors import VarpiError
from varpi.runtime.files import open_regular

_CHUNK = 1 << 22
_LONGEST_LINE = 1 << 24
_WRITTEN = np.ones(256, dtype=np.int64)
_WRITTEN[list(b" \t\r\n\v\f")] = 0


class JsonLines:
    """Files whose lines are `{"image_path": "a/b.jpg", "text": ["a caption", …]}`; blank lines are passed over.

    Image paths are absolute, or relative to the directory of the file.

    Args:
        paths: the files.
        image_size: side of the square images, in pixels.
        caption_fields: where a line has its caption, in order of preference; see `pick_caption`.
        min_side: the shorter side that an image must have at least, in pixels.

    Raises:
        VarpiError: a file cannot be read, or none has a line in it.
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
        self._lines: list[np.ndarray] = []  # for each file int64 (lines, 3): number, start and end in bytes
        for path in self._paths:
            lines, checksum = _index(path)
            self._lines.append(lines)
            digest.update(f"{os.path.basename(path)}\0{len(lines)}\0{checksum}\0".encode())
        self._ends = np.cumsum([len(lines) for lines in self._lines])
        self._twins = find_twins(self._paths)
        if len(self) == 0:
            raise VarpiError(f"{shown(self._paths)}: no images; the files have no lines")
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Item:
        name, record = self._record(index)
        caption = self._caption(name, record)
        path = record.get("image_path")
        if not isinstance(path, str) or not path or "\0" in path:
            raise Dropped(f"{name}: no image_path", NO_IMAGE)
        image = Path(self._paths[self._place(index)[0]]).parent / path
        return Item(load_image(image, f"{name} ({path})", self._image_size, min_side=self._min_side), caption)

    def caption(self, index: int) -> str:
        return self._caption(*self._record(index))

    def name(self, index: int) -> str:
        file, (line, _, _) = self._place(index)
        return f"{self._paths[file]}:{line + 1}"

    def key(self, index: int) -> str:
        """<name of the file>/<number of the line, from 0>, where LlamaGen keeps its features.

        Raises:
            VarpiError: files of one name in different folders; their features would lie in the same place.
        """
        check_names(self._twins)
        file, (line, _, _) = self._place(index)
        return f"{Path(self._paths[file]).stem}/{line}"

    def _place(self, index: int) -> tuple[int, np.ndarray]:
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, self._lines[file][index - self._ends[file]]

    def _record(self, index: int) -> tuple[str, dict[str, Any]]:
        (file, (_, start, end)), name = self._place(index), self.name(index)
        if end - start > _LONGEST_LINE:
            raise Dropped(f"{name}: has {end - start} bytes; at most {_LONGEST_LINE} are read", NO_CAPTION)
        try:
            with open_regular(self._paths[file]) as opened:
                opened.seek(start)
                record = parse_record(opened.read(end - start))
        except OSError as error:
            raise VarpiError(f"{self._paths[file]}: cannot be read any more ({error.strerror})") from error
        if record is None:
            raise Dropped(f"{name}: not a JSON object", NO_CAPTION)
        return name, record

    def _caption(self, name: str, record: dict[str, Any]) -> str:
        caption = find_caption(record, self._fields)
        if caption is None:
            raise Dropped(f"{name}: no usable caption", NO_CAPTION)
        return caption


def parse_record(data: bytes) -> dict[str, Any] | None:
    """A JSON object in UTF-8; None for whatever else."""
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def find_caption(record: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    """`pick_caption`, but None for half of a surrogate pair, which JSON can escape and no text encoder can read."""
    caption = pick_caption(record, fields)
    return caption if caption is not None and caption.encode(errors="ignore").decode() == caption else None


def find_twins(paths: Sequence[str]) -> tuple[str, str] | None:
    """Two files of one name in different folders."""
    first: dict[str, str] = {}
    for path in paths:
        other = first.setdefault(Path(path).stem, path)
        if other != path:
            return other, path
    return None


def check_names(twins: tuple[str, str] | None) -> None:
    """Refuse the result of `find_twins`, where features are looked for by the names of the files."""
    if twins is not None:
        raise VarpiError(
            f"{twins[0]} and {twins[1]} have the same name, by which the features of their captions are found; "
            "rename one, or use them apart"
        )


def shown(paths: Sequence[str]) -> str:
    """A few of many files, for a message."""
    return ", ".join(paths[:2]) + (f", … ({len(paths)} files)" if len(paths) > 2 else "")


def _index(path: str) -> tuple[np.ndarray, int]:
    """int64 (lines, 3): number, start and end of every line that is not blank; and the file's CRC-32."""
    ends, written, length, checksum = [], [], 0, 0
    count = 0  # of bytes that are no whitespace, up to each line's end
    try:
        with open_regular(path) as file:
            while chunk := file.read(_CHUNK):
                bytes_ = np.frombuffer(chunk, np.uint8)
                found = np.flatnonzero(bytes_ == ord("\n"))
                counts = count + np.cumsum(_WRITTEN[bytes_])
                ends.append(found + length)
                written.append(counts[found])
                count = int(counts[-1])
                checksum = zlib.crc32(chunk, checksum)
                length += len(chunk)
    except OSError as error:
        raise VarpiError(f"{path}: cannot be read ({error.strerror})") from error
    stops = np.concatenate([*ends, [length]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)
    lines = np.stack([np.arange(len(stops)), starts, stops], axis=1)
    return lines[np.diff(np.concatenate([*written, [count]]), prepend=0) > 0], checksum
