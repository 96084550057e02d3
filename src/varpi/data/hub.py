"""Tables of images: Hugging Face datasets saved to disk, parquet files, and datasets on the Hub.

The `datasets` library reads them all (parquet is turned into memory-mapped Arrow in its cache, once). The images are
decoded here, so that a broken one is a `BadImage` like any other.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from varpi.data.dataset import BadImage, Item
from varpi.data.transforms import load_image
from varpi.errors import VarpiError


class Table:
    """(image, class) from two columns of a Hugging Face dataset.

    Args:
        rows: the table. The image column holds images, {bytes, path} structs or bytes; the label column integers >= 0.
        name: what to call it in an error.
        image_size: side of the square images, in pixels.

    Raises:
        VarpiError: the table is empty, lacks a column, or a column holds something else.
    """

    def __init__(
        self, rows: datasets.Dataset, *, name: str, image_size: int, image_column: str, label_column: str
    ) -> None:
        for column, field in ((image_column, "image_column"), (label_column, "label_column")):
            if column not in rows.column_names:
                found = ", ".join(rows.column_names) or "none"
                raise VarpiError(f"{name}: no column {column!r}; set {field} to one of its columns ({found})")
        if len(rows) == 0:
            raise VarpiError(f"{name}: no images; the table has no rows")
        self._labels = _labels(rows, name, label_column)
        if isinstance(rows.features[image_column], datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self._type = rows.data.schema.field(image_column).type
        if not (_is_binary(self._type) or (pa.types.is_struct(self._type) and _has_bytes(self._type))):
            raise VarpiError(f"{name}: column {image_column!r} holds {self._type}; expected images (bytes and path)")
        names = getattr(rows.features[label_column], "names", None)  # a ClassLabel has them, a plain integer has not
        self.class_names: list[str] | None = names
        self.num_classes = len(names) if names else int(self._labels.max()) + 1
        if self._labels.max() >= self.num_classes:
            raise VarpiError(
                f"{name}: column {label_column!r} holds {self._labels.max()}, but names {self.num_classes} classes"
            )
        self._rows = rows.select_columns([image_column])
        self._column = image_column
        self._name = name
        self._image_size = image_size

    @property
    def fingerprint(self) -> str:
        """The labels and the length of every encoded image, which Arrow knows without reading the images."""
        column = self._rows.data.column(self._column)
        encoded = column if _is_binary(self._type) else column.flatten()[self._type.get_field_index("bytes")]
        lengths = pc.fill_null(pc.cast(pc.call_function("binary_length", [encoded]), pa.int64()), -1).to_numpy()
        names = "\0".join(self.class_names or [])
        return hashlib.sha256(self._labels.tobytes() + lengths.tobytes() + names.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        name = f"{self._name} row {index}"
        value = self._rows[int(index)][self._column]
        if isinstance(value, dict):
            path = value.get("path")
            name = f"{name} ({path})" if path else name
            value = value["bytes"] if value["bytes"] is not None else path and Path(path)
        if not value:
            raise BadImage(f"{name}: the cell is empty")
        return Item(load_image(value, name, self._image_size), int(self._labels[index]))


def load_saved(directory: Path, split: str) -> datasets.Dataset:
    """What `save_to_disk` wrote: one dataset (split "train") or a dictionary of splits."""
    try:
        loaded = datasets.load_from_disk(str(directory))
    except IndexError as error:  # the library's words for a table without rows: "list index out of range"
        raise VarpiError(f"{directory}: no images; the saved dataset has no rows") from error
    except Exception as error:
        raise VarpiError(f"{directory}: cannot be read as a saved dataset ({_reason(error)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise VarpiError(f"{directory}: no split {split!r}; it has {', '.join(map(str, loaded))}")
        return loaded[split]
    _require_train(str(directory), split)
    return loaded


def load_parquet(source: Path | Sequence[Path], split: str) -> datasets.Dataset:
    """A directory, whose splits the library tells by its file names; or files, which are split "train"."""
    files = [*source.glob("*.parquet"), *source.glob("data/*.parquet")] if isinstance(source, Path) else source
    shown = str(source) if isinstance(source, Path) else ", ".join(map(str, files[:3]))
    try:
        # The library's own message for this is a riddle
        if not any(pq.read_metadata(file).num_rows for file in files):
            raise VarpiError(f"{shown}: no images; the table has no rows")
        if isinstance(source, Path):
            return datasets.load_dataset(str(source), split=split)
        _require_train(shown, split)
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    except VarpiError:
        raise
    except Exception as error:
        raise VarpiError(f"{shown}: cannot be read as parquet ({_reason(error)})") from error


def load_hub(name: str, revision: str | None, split: str) -> datasets.Dataset:
    """Download a dataset of the Hub, or take it from the library's cache."""
    try:
        return datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:
        raise VarpiError(
            f"{name}: no such path here, and not to be had from the Hugging Face Hub either ({_reason(error)})"
        ) from error


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


def _reason(error: Exception) -> str:
    # `datasets` wraps what went wrong ("An error occurred while generating the dataset") around the real cause
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
