"""Tables of images: Hugging Face datasets saved to disk, parquet files, and datasets on the Hub.

The `datasets` library reads them all (parquet is turned into memory-mapped Arrow in its cache, once). The images are
decoded here, so that a broken one is a `BadImage` like any other.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from varpi.data.captions import pick_caption
from varpi.data.classes import number_classes
from varpi.data.dataset import NO_CAPTION, BadImage, Dropped, Item
from varpi.data.transforms import load_image
from varpi.errors import VarpiError


class Columns(NamedTuple):
    """What is read of a table."""

    image: str
    label: str | None
    captions: Sequence[str] = ()


class ImageColumn:
    """The image column of a Hugging Face dataset.

    Args:
        rows: the table. The column holds images, {bytes, path} structs or bytes.
        table: what to call the table in an error.
        image_size: side of the square images, in pixels.
        column: its name.
        min_side: the shorter side that an image must have at least, in pixels.
        folder: what relative paths of images begin at.

    Raises:
        VarpiError: the table is empty, lacks the column, or the column holds something else.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        table: str,
        *,
        image_size: int,
        column: str,
        min_side: int = 0,
        folder: Path | None = None,
    ) -> None:
        check_columns(rows.column_names, table, image_column=column)
        if len(rows) == 0:
            raise VarpiError(f"{table}: no images; the table has no rows")
        if isinstance(rows.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        self._type = rows.data.schema.field(column).type
        check_image_type(self._type, table, column)
        self._rows = rows.select_columns([column])
        self.column = column
        self.table = table
        self._image_size = image_size
        self._min_side = min_side
        self._folder = folder

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{self.table} row {index}"

    def lengths(self) -> np.ndarray:
        """int64 (rows,) bytes of every encoded image, which Arrow knows without reading the images."""
        column = self._rows.data.column(self.column)
        encoded = column if _is_binary(self._type) else column.flatten()[self._type.get_field_index("bytes")]
        return pc.fill_null(pc.cast(pc.call_function("binary_length", [encoded]), pa.int64()), -1).to_numpy()

    def __getitem__(self, index: int) -> Tensor:
        return decode_cell(
            self._rows[int(index)][self.column],
            self.name(index),
            self._image_size,
            min_side=self._min_side,
            folder=self._folder,
        )


class Table:
    """(image, class) from two columns of a Hugging Face dataset.

    Args:
        rows: the table. The label column holds integers >= 0.
        images: its images.
        classes: the names of all classes in the order of their ids, where they are known; those of a ClassLabel are
            looked up in it, plain integers are its ids already.

    Raises:
        VarpiError: the table lacks the column, the column holds something else, or a class is none of `classes`.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        images: ImageColumn,
        *,
        label_column: str,
        classes: Sequence[str] | None = None,
    ) -> None:
        name = images.table
        check_columns(rows.column_names, name, image_column=images.column, label_column=label_column)
        self._images = images
        labels = _labels(rows, name, label_column)
        names = getattr(rows.features[label_column], "names", None)  # a ClassLabel has them, a plain integer has not
        count = len(names) if names else None if classes is None else len(classes)
        if count is not None and labels.max() >= count:
            what = "but names" if names else "but data.classes, or the generator, names"
            raise VarpiError(f"{name}: column {label_column!r} holds {labels.max()}, {what} {count} classes")
        self.class_names: tuple[str, ...] | None = None if classes is None else tuple(classes)
        if names:
            ids, self.class_names = number_classes(names, classes, name)
            labels = np.array(ids)[labels]
        self._labels = labels
        self.num_classes = len(self.class_names) if self.class_names else int(labels.max()) + 1

    @property
    def fingerprint(self) -> str:
        """The labels and the length of every encoded image."""
        names = "\0".join(self.class_names or [])
        return hashlib.sha256(self._labels.tobytes() + self._images.lengths().tobytes() + names.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Item:
        return Item(self._images[index], int(self._labels[index]))


class CaptionTable:
    """(image, caption) from columns of a Hugging Face dataset.

    Args:
        rows: the table.
        images: its images.
        caption_columns: columns of captions in order of preference; a row's caption is the first that is not blank.
            Dotted paths reach into structs and lists, as in `pick_caption`.

    Raises:
        VarpiError: the table lacks a column, or has no caption in any row.
    """

    num_classes = None
    class_names = None

    def __init__(self, rows: datasets.Dataset, images: ImageColumn, *, caption_columns: Sequence[str]) -> None:
        name = images.table
        columns = check_columns(rows.column_names, name, image_column=images.column, caption_columns=caption_columns)
        self._images = images
        self._texts = rows.select_columns(columns)
        self._fields = tuple(caption_columns)
        texts: Any = self._texts  # iterates over dictionaries, which its type does not say
        if not any(pick_caption(row, self._fields) for row in texts):
            raise VarpiError(f"{name}: no row has a caption in {' or '.join(self._fields)}; set caption_column")

    @property
    def fingerprint(self) -> str:
        """The length of every encoded image, and that of every caption in a column of plain text."""
        digest = hashlib.sha256(self._images.lengths().tobytes())
        for field in self._texts.data.schema:
            if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
                lengths = pc.call_function("binary_length", [self._texts.data.column(field.name)])
                digest.update(pc.fill_null(pc.cast(lengths, pa.int64()), -1).to_numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Item:
        caption = self.caption(index)
        return Item(self._images[index], caption)

    def caption(self, index: int) -> str:
        caption = pick_caption(self._texts[int(index)], self._fields)
        if caption is None:
            raise Dropped(f"{self.name(index)}: no caption in {' or '.join(self._fields)}", NO_CAPTION)
        return caption

    def name(self, index: int) -> str:
        return self._images.name(index)

    def key(self, index: int) -> str:
        return f"rows/{index}"


def check_columns(
    present: Sequence[str],
    name: str,
    *,
    image_column: str,
    label_column: str | None = None,
    caption_columns: Sequence[str] = (),
) -> list[str]:
    """The columns that labels or captions are read from; a caption's may be a dotted path into one.

    Raises:
        VarpiError: one of the columns is not among those `present`.
    """
    found = ", ".join(present) or "none"
    columns = []
    wanted = [(image_column, "image_column"), *((column, "caption_column") for column in caption_columns)]
    for path, setting in [*wanted, *([(label_column, "label_column")] if label_column is not None else [])]:
        column = path if path in present or setting != "caption_column" else path.partition(".")[0]
        if column not in present:
            raise VarpiError(f"{name}: no column {column!r}; set {setting} to one of its columns ({found})")
        if setting != "image_column" and column not in columns:
            columns.append(column)
    return columns


def check_image_type(kind: pa.DataType, name: str, column: str) -> None:
    """Raises VarpiError where the Arrow type of a column is not one of images."""
    if not (_is_binary(kind) or (pa.types.is_struct(kind) and _has_bytes(kind))):
        raise VarpiError(f"{name}: column {column!r} holds {kind}; expected images (bytes and path)")


def decode_cell(
    value: Any,
    name: str,
    image_size: int,
    *,
    min_side: int = 0,
    folder: Path | None = None,
    repository: str | None = None,
) -> Tensor:
    """The image in a cell: bytes, or a {bytes, path} struct. Arguments and errors as in `load_image`.

    A path is that of a local file, or of one in the Hub's `repository`, which streamed datasets that keep their images
    as files have; nothing else is fetched, for it is the data that would say from where.

    folder: what a relative path begins at. repository: "hf://datasets/ORG/NAME@COMMIT".
    """
    if isinstance(value, dict):
        path = value.get("path")
        name = f"{name} ({path})" if path else name
        value = value["bytes"]
        if value is None and path:
            value = _fetch(path, name, repository) if "://" in path else _local(path, name, folder)
    if not value:
        raise BadImage(f"{name}: the cell is empty")
    return load_image(value, name, image_size, min_side=min_side)


def _local(path: str, name: str, folder: Path | None) -> Path:
    if folder is None and not Path(path).is_absolute():
        raise BadImage(f"{name}: is a relative path, and the table's files lie in several folders")
    return (folder or Path()) / path


def _fetch(url: str, name: str, repository: str | None) -> bytes:
    archive, _, target = url.rpartition("::")
    ours = repository is not None and target.startswith(f"{repository}/") and ".." not in target.split("/")
    if not ours or not re.fullmatch(r"((zip|tar)://[^:]*)?", archive):
        raise BadImage(f"{name}: only local files and those of the dataset's own Hub repository are read")
    try:
        files, path = fsspec.url_to_fs(url)
        return files.cat_file(path)
    except Exception as error:
        raise BadImage(f"{name}: cannot be fetched ({reason(error)})") from error


def load_saved(directory: Path, split: str) -> datasets.Dataset:
    """What `save_to_disk` wrote: one dataset (split "train") or a dictionary of splits."""
    try:
        loaded = datasets.load_from_disk(str(directory))
    except IndexError as error:  # the library's words for a table without rows: "list index out of range"
        raise VarpiError(f"{directory}: no images; the saved dataset has no rows") from error
    except Exception as error:
        raise VarpiError(f"{directory}: cannot be read as a saved dataset ({reason(error)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise VarpiError(f"{directory}: no split {split!r}; it has {', '.join(map(str, loaded))}")
        return loaded[split]
    _require_train(str(directory), split)
    return loaded


def load_parquet(source: Path | Sequence[Path], split: str, columns: Columns) -> datasets.Dataset:
    """A directory, whose splits the library tells by its file names; or files, which are split "train"."""
    files = parquet_files(source) if isinstance(source, Path) else list(source)
    shown = str(source) if isinstance(source, Path) else ", ".join(map(str, files[:3]))
    try:
        # The library's own message for this is a riddle
        if not any(pq.read_metadata(file).num_rows for file in files):
            raise VarpiError(f"{shown}: no images; the table has no rows")
        wanted = check_files(files, columns)
        if isinstance(source, Path):
            return datasets.load_dataset(str(source), split=split, columns=wanted)
        _require_train(shown, split)
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train", columns=wanted)
    except VarpiError:
        raise
    except Exception as error:
        raise VarpiError(f"{shown}: cannot be read as parquet ({reason(error)})") from error


def parquet_files(directory: Path) -> list[Path]:
    return sorted([*directory.glob("*.parquet"), *directory.glob("data/*.parquet")])


def check_files(files: Sequence[Path], columns: Columns) -> list[str]:
    """The columns to read of parquet files, once all of them have these, with the same classes under the same numbers.

    Other columns may differ. Raises VarpiError naming the file, or the two that disagree.
    """
    wanted: list[str] = []
    first: tuple[Path, list[str] | None] | None = None
    for file in files:
        schema = pq.read_schema(file)
        found = check_columns(
            schema.names,
            str(file),
            image_column=columns.image,
            label_column=columns.label,
            caption_columns=columns.captions,
        )
        wanted = [columns.image, *found]
        if columns.label is not None:
            names = _stored_names(schema, columns.label)
            first = first or (file, names)
            if names != first[1]:
                raise VarpiError(
                    f"{first[0]} and {file} number the classes of column {columns.label!r} differently "
                    f"({_in_short(first[1])} and {_in_short(names)}); write both with the same ClassLabel"
                )
    return wanted


def _stored_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of a ClassLabel in the metadata that `datasets` writes into parquet files."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _in_short(names: list[str] | None) -> str:
    return "no names" if names is None else ", ".join(map(str, names[:3])) + (", …" if len(names) > 3 else "")


def common_folder(paths: Sequence[Path]) -> Path | None:
    """The directory that all of these files lie in, if there is one."""
    folders = {path.parent for path in paths}
    return folders.pop() if len(folders) == 1 else None


def load_hub(name: str, revision: str | None, split: str) -> datasets.Dataset:
    """Download a dataset of the Hub, or take it from the library's cache."""
    try:
        return datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:
        raise VarpiError(
            f"{name}: no such path here, and not to be had from the Hugging Face Hub either ({reason(error)})"
        ) from error


def stream_hub(name: str, revision: str | None, split: str) -> tuple[datasets.IterableDataset, str]:
    """A dataset of the Hub, to be read from beginning to end, and the commit that it is now and will stay at."""
    try:
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision).sha
        rows = datasets.load_dataset(name, split=split, revision=commit, streaming=True)
    except Exception as error:
        raise VarpiError(
            f"{name}: no such path here, and not to be had from the Hugging Face Hub either ({reason(error)})"
        ) from error
    return _undecoded(rows, name), str(commit)


def stream_parquet(paths: Sequence[Path], split: str, columns: Columns) -> tuple[datasets.IterableDataset, list[Path]]:
    """One directory, or files, as in `load_parquet`, to be read from beginning to end; and the files."""
    directory = paths[0] if paths[0].is_dir() else None
    shown = str(directory) if directory else ", ".join(map(str, paths[:3]))
    files = parquet_files(directory) if directory else list(paths)
    try:
        wanted = check_files(files, columns)
        if directory:
            rows = datasets.load_dataset(str(directory), split=split, streaming=True, columns=wanted)
        else:
            _require_train(shown, split)
            names = [str(path) for path in paths]
            rows = datasets.load_dataset("parquet", data_files=names, split="train", streaming=True, columns=wanted)
    except VarpiError:
        raise
    except Exception as error:
        raise VarpiError(f"{shown}: cannot be read as parquet ({reason(error)})") from error
    return _undecoded(rows, shown), files


def _undecoded(rows: Any, name: str) -> datasets.IterableDataset:
    if rows.features is None:
        raise VarpiError(f"{name}: does not say what columns it has, and cannot be streamed; leave out data.stream")
    return rows.decode(False)


def _labels(rows: datasets.Dataset, name: str, column: str) -> np.ndarray:
    """int64 (rows,) classes, checked."""
    values = rows.data.column(column)
    if not pa.types.is_integer(values.type):
        raise VarpiError(f"{name}: column {column!r} holds {values.type}; expected integer class ids")
    labels = pc.fill_null(pc.cast(values, pa.int64()), -1).to_numpy()
    if labels.min() < 0:
        row = int(np.argmax(labels < 0))
        raise VarpiError(f"{name}: column {column!r} holds no class at row {row}; every image needs a class id >= 0")
    return labels


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_bytes(kind: pa.StructType) -> bool:
    return any(field.name == "bytes" and _is_binary(field.type) for field in kind)


def _require_train(name: str, split: str) -> None:
    if split != "train":
        raise VarpiError(f"{name}: no split {split!r}; data without splits is split 'train'")


def reason(error: Exception) -> str:
    # `datasets` wraps what went wrong ("An error occurred while generating the dataset") around the real cause
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
