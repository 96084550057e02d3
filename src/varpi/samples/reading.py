"""Sets of images as an evaluation reads them: streamed from `.npz` files, folders or datasets, never held together.

A set is known by the sha256 of its contents, `contents_sha256`: the same pixels in the same order give the same one,
whatever files hold them. That takes a pass over all of them, so before it a set has a cheap `key` of its files' names,
sizes and times of change.

Shapes: B images of H x W pixels, uint8.
"""

import glob
import hashlib
import json
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from varpi.data import Dataset
from varpi.data.images import SUFFIXES, decode
from varpi.data.left_out import LeftOut
from varpi.data.listing import list_images
from varpi.data.pixels import to_uint8
from varpi.errors import VarpiError
from varpi.runtime.files import line, read_text
from varpi.runtime.numpy_files import array_names, open_array, open_npz

RECORD = "sample.json"
"""What `varpi sample` writes beside images, last of all: how they were made."""
UNFINISHED = "unfinished.json"
"""The same while images are being made."""


class HashedImages(NamedTuple):
    """Consecutive images of a set, each with its sha256."""

    images: Tensor
    """uint8 (B,3,H,W)."""
    digests: np.ndarray
    """uint8 (B,32): the sha256 of the pixels of each, H x W x 3."""


class SampleSet(ABC):
    """Images of one size in a fixed order."""

    source: str
    """Where they lie, for people."""
    count: int
    height: int
    width: int
    sampling: Mapping[str, Any] | None = None
    """How they were made, as `varpi sample` recorded it; None where no sample.json lies beside them."""

    @property
    @abstractmethod
    def key(self) -> str:
        """Hex digest that changes when the files do, by their names, sizes and times; reads none of them."""

    @abstractmethod
    def _arrays(self, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        """The images of each range, uint8 (B,H,W,3); the ranges are ascending."""

    def batches(self, ranges: Sequence[range], workers: int = 0) -> Iterator[HashedImages]:
        """The images of each of the ascending `ranges`, read ahead of their use.

        workers: processes that decode; 0 reads in a thread. Files of arrays are always read in a thread.

        Raises:
            VarpiError: an image cannot be read, or its size is another.
        """
        return _ahead(map(_hashed, self._arrays(ranges)))


class Announced(SampleSet):
    """A set that is to be made, of which size and number are known: for checks beforehand."""

    def __init__(self, source: str, count: int, side: int, sampling: Mapping[str, Any]) -> None:
        self.source, self.count, self.sampling = source, count, sampling
        self.height = self.width = side

    @property
    def key(self) -> str:
        raise VarpiError(f"{self.source}: its samples are not made yet")

    def _arrays(self, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        raise VarpiError(f"{self.source}: its samples are not made yet")


class NpzImages(SampleSet):
    """The array arr_0, uint8 (B,H,W,3), of one or several `.npz` files, one after the other."""

    def __init__(self, paths: Sequence[Path], source: str) -> None:
        self.source = source
        self._paths = list(paths)
        shapes = [_shape_in(path) for path in self._paths]
        for path, shape in zip(self._paths, shapes, strict=True):
            if shape[1:] != shapes[0][1:]:
                raise _other_size(path, shape, self._paths[0], shapes[0])
        self._counts = [shape[0] for shape in shapes]
        self.count = sum(self._counts)
        self.height, self.width = shapes[0][1:3]

    @property
    def key(self) -> str:
        return _digest(["npz", self.count, *map(_stat, self._paths)])

    def _arrays(self, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        ends = np.cumsum(self._counts)
        opened, reader = -1, None
        try:
            for images in ranges:
                array = np.empty((len(images), self.height, self.width, 3), dtype=np.uint8)
                at = images.start
                while at < images.stop:
                    number = int(np.searchsorted(ends, at, side="right"))
                    if number != opened:
                        if reader is not None:
                            reader.close()
                        opened, reader = number, _NpzReader(self._paths[number])
                    assert reader is not None
                    begin = int(ends[number]) - self._counts[number]
                    stop = min(images.stop, int(ends[number]))
                    reader.read_into(array[at - images.start : stop - images.start], at - begin)
                    at = stop
                yield array
        finally:
            if reader is not None:
                reader.close()


class _NpzReader:
    """Reads images of an `.npz` in ascending order, straight out of the archive, packed or not."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with ExitStack() as opening:
            archive = opening.enter_context(open_npz(path))
            self._member, self._header = opening.enter_context(open_array(archive, "arr_0"))
            self._open = opening.pop_all()

    def read_into(self, array: np.ndarray, start: int) -> None:
        """Fill `array` (B,H,W,3) with the images from `start` on."""
        view = array.data.cast("B")
        try:
            self._member.seek(self._header.data + start * array[0].nbytes)
            filled = 0
            while filled < len(view) and (part := self._member.read(len(view) - filled)):
                view[filled : filled + len(part)] = part
                filled += len(part)
        except Exception as error:  # zipfile and the decompressors have many words for a damaged file
            raise VarpiError(f"{self._path}: cannot be read as .npz ({line(error)})") from error
        if filled < len(view):
            raise VarpiError(f"{self._path}: cannot be read as .npz (it ends within arr_0)")

    def close(self) -> None:
        self._open.close()


class _MappedImages(SampleSet):
    """Images that are loaded one by one, perhaps by worker processes."""

    @abstractmethod
    def load(self, index: int) -> np.ndarray:
        """uint8 (H,W,3). Raises VarpiError."""

    def _arrays(self, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        return map(self._stack, ranges)

    def _stack(self, images: range) -> np.ndarray:
        return np.stack([self.load(index) for index in images])

    def batches(self, ranges: Sequence[range], workers: int = 0) -> Iterator[HashedImages]:
        return super().batches(ranges) if workers == 0 else self._from_workers(ranges, workers)

    def _from_workers(self, ranges: Sequence[range], workers: int) -> Iterator[HashedImages]:
        loader = DataLoader(
            _InWorkers(self),
            sampler=list(ranges),  # type: ignore[arg-type] - an item of it is a whole batch
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # its own, so that the global random state is left alone
            worker_init_fn=_leave_signals_to_parent,
        )
        for loaded in loader:
            if isinstance(loaded, VarpiError):
                raise loaded
            images, digests = loaded
            yield HashedImages(images.permute(0, 3, 1, 2), digests)


class _InWorkers(torch.utils.data.Dataset[Any]):
    """Range -> batch, as DataLoader's workers hold it. Failures travel as data: DataLoader would wrap them in text."""

    def __init__(self, images: _MappedImages) -> None:
        self._images = images

    def __getitem__(self, index: Any) -> Any:
        try:
            array = self._images._stack(index)
        except VarpiError as error:
            return VarpiError(str(error))
        return torch.from_numpy(array), _digests(array)


class FolderImages(_MappedImages):
    """Every image below a directory, ordered by path, except files called grid.png."""

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        left_out = LeftOut()
        self._files = image_files(folder, left_out)
        self.count = len(self._files)
        left_out.say(str(folder), self.count + len(left_out), "files")
        if not self._files:
            raise VarpiError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
        self.width, self.height = decode(self._files[0], str(self._files[0])).size

    @property
    def key(self) -> str:
        return _digest(["folder", *map(_stat, self._files)])

    def load(self, index: int) -> np.ndarray:
        file = self._files[index]
        pixels = np.asarray(decode(file, str(file)))
        if pixels.shape != (self.height, self.width, 3):
            raise _other_size(file, (1, *pixels.shape), self._files[0], (1, self.height, self.width, 3))
        return pixels


class DatasetImages(_MappedImages):
    """The images of a dataset of `varpi.data`, as 8-bit pixels, in its own order."""

    def __init__(self, dataset: Dataset, source: str, image_size: int) -> None:
        self.source = source
        self._dataset = dataset
        self.count = len(dataset)
        if self.count == 0:
            raise VarpiError(f"{source}: holds no images")
        self.height = self.width = image_size

    @property
    def key(self) -> str:
        return _digest(["dataset", self.source, self._dataset.fingerprint, self.height])

    def load(self, index: int) -> np.ndarray:
        return to_uint8(self._dataset[index].image[None])[0]


def open_samples(source: str | os.PathLike[str]) -> SampleSet:
    """The images at `source`.

    source: a directory of `varpi sample`, whose samples.npz is read where there is one and whose sample.json says how
        they were made; a folder of images, searched deeply; an `.npz` with uint8 images as arr_0; or several of those
        as one set: a folder of them, or a glob ("out/part-*.npz"), ordered by name.

    Raises:
        VarpiError: nothing is there, it holds no images, or sample.json cannot be read or lists another number of them.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / UNFINISHED).is_file():
            raise VarpiError(f"{path}: its samples are unfinished; run `varpi sample` again, which goes on with them")
        images = _open_folder(path)
        images.sampling = read_sampling(path, images.count)
        return images
    if path.is_file():
        if path.suffix != ".npz":
            raise VarpiError(f"{path}: not a set of images; expected an .npz file or a directory")
        return NpzImages([path], str(path))
    files = sorted(map(Path, glob.glob(str(path))))
    if not files:
        raise VarpiError(f"{path}: no such file or directory; expected an .npz, a glob of them, or a folder of images")
    if others := [file for file in files if file.suffix != ".npz"]:
        raise VarpiError(f"{path}: also names {others[0]}, which is not an .npz file")
    return NpzImages(files, str(path))


def contents_sha256(height: int, width: int, digests: Iterable[np.ndarray]) -> str:
    """What a set of images is known by: the sha256 of its size and of the sha256 of each image's pixels, in order.

    digests: uint8 (B,32), in parts. In this form the parts can be had in any order, by several processes, and kept.
    """
    whole = hashlib.sha256(f"{height}x{width}x3 uint8\n".encode())
    for part in digests:
        whole.update(np.ascontiguousarray(part).data)
    return whole.hexdigest()


def image_files(folder: Path, left_out: LeftOut | None = None) -> list[Path]:
    """Every image below a directory, as `list_images` finds them, ordered by path, but for contact sheets (grid.png).

    left_out: where files that are neither images nor made by `varpi sample` are counted.
    """
    found = list_images(folder, LeftOut() if left_out is None else left_out, expected=_is_expected)
    return sorted(map(Path, found))


def _is_expected(name: str) -> bool:
    return name == "grid.png" or name.endswith((".npz", ".json", ".jsonl"))


def _open_folder(path: Path) -> SampleSet:
    if (path / "samples.npz").is_file():
        return NpzImages([path / "samples.npz"], str(path))
    if not image_files(path) and (parts := sorted(path.glob("*.npz"))):
        return NpzImages(parts, str(path))
    return FolderImages(path)


def read_sampling(folder: Path, count: int) -> dict[str, Any] | None:
    """How `varpi sample` made the `count` images of a folder; None where it did not.

    Raises VarpiError for a record that cannot be read, or of another number of images.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise VarpiError(f"{path}: cannot be read as JSON ({line(error)})") from error
    if not isinstance(record, dict):
        raise VarpiError(f"{path}: holds a {type(record).__name__}, not the record of `varpi sample`")
    for what in ("classes", "prompts"):
        if isinstance(listed := record.get(what), list) and len(listed) != count:
            raise VarpiError(
                f"{path}: lists {len(listed)} {what}, and there are {count} images; sample them again, or remove "
                "sample.json"
            )
    return record


def _shape_in(path: Path) -> tuple[int, ...]:
    """The shape of arr_0 in an `.npz`, which must be of uint8 images."""
    with open_npz(path) as archive:
        if "arr_0" not in (names := array_names(archive)):
            raise VarpiError(f"{path}: holds no array named arr_0 (found: {', '.join(names[:5]) or 'none'})")
        with open_array(archive, "arr_0") as (_, header):
            shape, dtype = header.shape, header.dtype
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise VarpiError(f"{path}: arr_0: expected uint8 of shape (B, H, W, 3), got {dtype} {shape}")
    if header.fortran_order:
        raise VarpiError(f"{path}: arr_0 is stored column by column; save a C-contiguous array")
    return shape


def _other_size(path: Path, shape: Sequence[int], first: Path, expected: Sequence[int]) -> VarpiError:
    return VarpiError(
        f"{path}: is {shape[2]}x{shape[1]} where {first.name} is {expected[2]}x{expected[1]}; "
        "an evaluation needs one size"
    )


def _hashed(array: np.ndarray) -> HashedImages:
    return HashedImages(torch.from_numpy(array).permute(0, 3, 1, 2), _digests(array))


def _digests(array: np.ndarray) -> np.ndarray:
    digests = b"".join(hashlib.sha256(np.ascontiguousarray(image).data).digest() for image in array)
    return np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)


def _ahead(items: Iterator[HashedImages]) -> Iterator[HashedImages]:
    """The same items, each fetched by a thread while its predecessor is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


def _stat(path: Path) -> list[Any]:
    try:
        found = path.stat()
    except OSError as error:
        raise VarpiError(f"{path}: cannot be read ({error.strerror})") from error
    return [os.path.abspath(path), found.st_size, found.st_mtime_ns]


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _unchanged(loaded: Any) -> Any:
    return loaded


def _leave_signals_to_parent(_worker: int) -> None:
    # Ctrl-C signals every process; the parent then stops its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
