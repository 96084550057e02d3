"""`open_dataset`, which finds out what kind of data a source is."""

import glob
import re
from pathlib import Path

from varpi.data.dataset import Dataset
from varpi.errors import VarpiError

# "org/name", with "@revision" when one is wanted
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def open_dataset(
    source: str | Path,
    *,
    image_size: int,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
) -> Dataset:
    """Open the (image, class) pairs at `source`; images come out centre-cropped to `image_size`.

    A source that has no splits of its own (one tree of class folders, one parquet file, one saved `Dataset`) is
    the split "train".

    Args:
        source: one of
            "digits", the embedded 5000 handwritten digits (32x32; splits train, validation, test);
            a tree of class folders (ids follow the sorted names), or a directory that holds one such tree per split;
            a directory written by `datasets.Dataset.save_to_disk`;
            a parquet file, a glob of them, or a directory of them (splits told by their names);
            the id of a dataset on the Hugging Face Hub, "org/name" or "org/name@revision".
        image_size: side of the square images, in pixels.
        split: "train", "validation" or "test", or whatever the source calls its splits.
        image_column: column of the images; tabular sources only.
        label_column: column of the integer classes; tabular sources only.

    Raises:
        VarpiError: nothing is there, it holds no images, or it lacks the split or a column.
    """
    # Imported on demand: torchvision and `datasets` each take about a second, and the digits need neither.
    text = str(source)
    if image_size < 1:
        raise VarpiError(f"image_size is {image_size}; it must be at least 1")
    if text == "digits":
        from varpi.data.digits import Digits

        return Digits(split=split, image_size=image_size)

    path = Path(source).expanduser()
    if path.is_dir() and not _is_tabular(path):
        from varpi.data.folder import ImageFolder

        return ImageFolder(path, split=split, image_size=image_size)

    from varpi.data.hub import Table, load_hub, load_parquet, load_saved

    if path.is_dir():
        rows = load_saved(path, split) if _is_saved(path) else load_parquet(path, split)
    elif path.is_file():
        if path.suffix != ".parquet":
            raise VarpiError(f"{path}: not a data set; expected a directory or a .parquet file")
        rows = load_parquet([path], split)
    elif glob.has_magic(text):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise VarpiError(f"{text}: no file matches this pattern")
        if others := [file for file in files if file.suffix != ".parquet"]:
            raise VarpiError(f"{text}: the pattern also matches {others[0]}, which is not a .parquet file")
        rows = load_parquet(files, split)
    elif match := _HUB_ID.fullmatch(text):
        rows = load_hub(match["name"], match["revision"], split)
    else:
        raise VarpiError(f"{text}: no such data; give a directory, a .parquet file, a Hub id (org/name) or 'digits'")
    return Table(
        rows,
        name=f"{text}[{split}]",
        image_size=image_size,
        image_column=image_column,
        label_column=label_column,
    )


def _is_saved(directory: Path) -> bool:
    """Whether `directory` was written by `save_to_disk`."""
    return (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file()


def _is_tabular(directory: Path) -> bool:
    # A clone of a Hub repository keeps its files in data/. Looking deeper would walk whole image trees.
    return _is_saved(directory) or any(directory.glob("*.parquet")) or any(directory.glob("data/*.parquet"))
