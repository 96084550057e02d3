"""`open_dataset`, which finds out what kind of data a source is."""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from varpi.data.caption_check import is_captioned
from varpi.data.captions import CAPTION_FIELDS
from varpi.data.classes import Classes, read_classes
from varpi.data.dataset import Dataset
from varpi.data.left_out import LeftOut
from varpi.data.listing import directories, list_images
from varpi.errors import VarpiError

# "org/name", with "@revision" when one is wanted
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMMA = re.compile(r",(?![^{}]*\})")
_MOST_FILES = 1_000_000

Kind = Literal["digits", "captioned-digits", "shapes", "folders", "saved", "parquet", "tar", "jsonl", "hub"]
_FILES: dict[str, Kind] = {".parquet": "parquet", ".tar": "tar", ".gz": "tar", ".tgz": "tar", ".jsonl": "jsonl"}


def open_dataset(
    source: str | Path,
    *,
    image_size: int,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    caption_column: str | Sequence[str] | None = None,
    caption_features: str | Path | None = None,
    min_side: int | None = None,
    classes: Classes | None = None,
) -> Dataset:
    """Open the (image, class) or (image, caption) pairs at `source`; images come out centre-cropped to `image_size`.

    A source that has no splits of its own (one tree of class folders, one parquet file, one saved `Dataset`, shards)
    is the split "train". Tar shards and jsonl files always have captions, tables do where `caption_column` is given.

    Args:
        source: one of
            "digits", the embedded 5000 handwritten digits (32x32; splits train, validation, test), or
            "captioned-digits", the same with sentences that name them;
            "shapes", coloured shapes drawn by numbers, with GenEval's sentences (splits of `varpi.data.scenes.SCENES`);
            a tree of class folders, or a directory that holds one such tree per split;
            a directory written by `datasets.Dataset.save_to_disk`;
            parquet files, or a directory of them (splits told by their names);
            tar shards of the WebDataset form, or a directory of them;
            a .jsonl file, or a directory of them, as LlamaGen reads for text-to-image;
            the id of a dataset on the Hugging Face Hub, "org/name" or "org/name@revision".
            Files are named one by one between commas, by a glob, or by braces ("laion/{00000..00127}.tar"). Directories
            of shards and of jsonl files may lie in one directory per split.
        image_size: side of the square images, in pixels.
        split: "train", "validation" or "test", or whatever the source calls its splits.
        image_column: column of the images; tabular sources only.
        label_column: column of the integer classes; tabular sources only.
        caption_column: field of the captions, or several in order of preference, as `pick_caption` reads them. None:
            `CAPTION_FIELDS` in shards and jsonl files, classes in tables.
        caption_features: directory of caption features, which become the conditions; see `WithFeatures`.
        min_side: captioned images whose shorter side has fewer pixels are left out; None: image_size.
        classes: the names of all classes in the order of their ids, as `read_classes` takes them. None: ImageNet's,
            where the source names its classes by WordNet ids of those, or else its own, in its own order.

    Raises:
        VarpiError: nothing is there, it holds no images, it lacks the split or a column, or the arguments contradict
            each other.
    """
    if image_size < 1:
        raise VarpiError(f"image_size is {image_size}; it must be at least 1")
    fields = caption_fields(caption_column)
    if fields and label_column != "label":
        raise VarpiError(f"label_column {label_column!r} and caption_column are both given; leave out one of them")
    names = None if classes is None else read_classes(classes)
    dataset = _open(str(source), image_size, split, image_column, label_column, fields, min_side, names)
    if names is not None and dataset.num_classes is None:
        raise VarpiError(f"{source}: has captions, but {len(names)} classes are named for it; leave them out")
    if caption_features is None:
        return dataset
    if not is_captioned(dataset):
        raise VarpiError(f"{source}: has classes, but caption_features are for captions; leave them out")
    from varpi.data.caption_features import WithFeatures

    return WithFeatures(dataset, caption_features, split)


def caption_fields(caption_column: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in a `caption_column`, which may be a single one.

    Raises:
        VarpiError: an empty list, or an empty name.
    """
    if caption_column is None:
        return ()
    fields = (caption_column,) if isinstance(caption_column, str) else tuple(caption_column)
    if not fields or not all(fields):
        raise VarpiError(f"caption_column is {caption_column!r}; give the name of a column, or leave it out")
    return fields


@dataclass(frozen=True)
class Place:
    """What a source turned out to be."""

    kind: Kind
    paths: tuple[Path, ...] = ()
    """Its files, or the one directory of "folders", "saved" and "parquet"."""
    name: str = ""
    """Id on the Hub."""
    revision: str | None = None


def locate(source: str, split: str) -> Place:
    """Find out what `source` is, as described at `open_dataset`.

    Raises:
        VarpiError: nothing is there, or files of several kinds; shards or jsonl files have no such split.
    """
    if source in ("digits", "captioned-digits", "shapes"):
        return Place(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _locate_in(path, split)
    if path.is_file():
        files = [path]
    elif glob.has_magic(source) or "," in source or "{" in source:
        files = list(_expand(source))
    elif path.suffix not in _FILES and (match := _HUB_ID.fullmatch(source)):
        return Place("hub", name=match["name"], revision=match["revision"])
    else:
        raise VarpiError(
            f"{source}: no such data; give a directory, .parquet, .tar or .jsonl files, a Hub id (org/name) or 'digits'"
        )
    first = files[0]
    if first.suffix not in _FILES:
        raise VarpiError(f"{first}: not a data set; expected a directory or a .parquet, .tar or .jsonl file")
    if others := [file for file in files if file.suffix != first.suffix]:
        raise VarpiError(f"{source}: also names {others[0]}, which is not a {first.suffix} file")
    kind = _FILES[first.suffix]
    if kind != "parquet":
        _require_train(source, split)
    return Place(kind, tuple(files))


def _open(
    source: str,
    image_size: int,
    split: str,
    image_column: str,
    label_column: str,
    fields: tuple[str, ...],
    min_side: int | None,
    classes: tuple[str, ...] | None,
) -> Dataset:
    place = locate(source, split)
    kind, paths = place.kind, place.paths
    table = kind in ("saved", "parquet", "hub")
    if fields and kind in ("digits", "captioned-digits", "shapes", "folders"):
        captioned = kind in ("captioned-digits", "shapes")
        what = "captions of its own" if captioned else "classes, and no field that could hold captions"
        raise VarpiError(f"{source}: has {what}; leave out caption_column")
    if min_side is not None and (kind in ("digits", "captioned-digits", "shapes", "folders") or (table and not fields)):
        raise VarpiError(f"{source}: min_side is for captioned images of many sizes; leave it out")
    if min_side is None:
        min_side = image_size
    # Imported on demand: torchvision and `datasets` each take about a second, and the digits need neither.
    if kind == "digits":
        from varpi.data.digits import Digits

        return Digits(split=split, image_size=image_size, classes=classes)
    if kind == "captioned-digits":
        from varpi.data.digits import CaptionedDigits

        return CaptionedDigits(split=split, image_size=image_size)
    if kind == "shapes":
        from varpi.data.shapes import CaptionedShapes

        return CaptionedShapes(split=split, image_size=image_size)
    if kind == "folders":
        from varpi.data.folder import ImageFolder

        return ImageFolder(paths[0], split=split, image_size=image_size, classes=classes)
    if kind == "tar":
        from varpi.data.tars import TarShards

        return TarShards(paths, image_size=image_size, caption_fields=fields or CAPTION_FIELDS, min_side=min_side)
    if kind == "jsonl":
        from varpi.data.jsonl import JsonLines

        return JsonLines(paths, image_size=image_size, caption_fields=fields or CAPTION_FIELDS, min_side=min_side)

    from varpi.data.tables import (
        CaptionTable,
        Columns,
        ImageColumn,
        Table,
        common_folder,
        load_hub,
        load_parquet,
        load_saved,
    )

    folder = None if kind == "hub" else paths[0] if paths[0].is_dir() else common_folder(paths)
    if kind == "hub":
        rows = load_hub(place.name, place.revision, split)
    elif kind == "saved":
        rows = load_saved(paths[0], split)
    else:
        columns = Columns(image_column, None if fields else label_column, fields)
        rows = load_parquet(paths[0] if paths[0].is_dir() else paths, split, columns)
    images = ImageColumn(
        rows,
        f"{source}[{split}]",
        image_size=image_size,
        column=image_column,
        min_side=min_side if fields else 0,
        folder=folder,
    )
    if fields:
        return CaptionTable(rows, images, caption_columns=fields)
    return Table(rows, images, label_column=label_column, classes=classes)


def _locate_in(path: Path, split: str) -> Place:
    if _is_saved(path):
        return Place("saved", (path,))
    if (place := _listed(path)) is not None:
        _require_train(str(path), split)
        return place
    # A clone of a Hub repository keeps its files in data/. Looking deeper would walk whole image trees.
    if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
        return Place("parquet", (path,))

    from varpi.data.folder import SPLITS

    names = dict.fromkeys([*SPLITS.get(split, [split]), *(name for names in SPLITS.values() for name in names)])
    found = {name: place for name in names if (place := _listed(path / name)) is not None}
    for name in SPLITS.get(split, [split]):
        if name in found:
            return found[name]
    if found:
        raise VarpiError(f"{path}: no split {split!r}; it has {', '.join(found)}")
    return Place("folders", (path,))


def _listed(directory: Path) -> Place | None:
    """The shards or jsonl files right in a directory. img2dataset puts a parquet file of metadata beside each shard."""
    shards, lists = sorted(directory.glob("*.tar")), sorted(directory.glob("*.jsonl"))
    if shards and lists:
        raise VarpiError(f"{directory}: holds tar shards and jsonl files; name those to read, as in {directory}/*.tar")
    if lists:
        return Place("jsonl", tuple(lists))
    # Class folders may lie beside the archives they came out of
    return Place("tar", tuple(shards)) if shards and not _has_images_below(directory) else None


def _has_images_below(directory: Path) -> bool:
    return any(list_images(directory / name, LeftOut(), seen=[directory]) for name in directories(directory))


def _is_saved(directory: Path) -> bool:
    """Whether `directory` was written by `save_to_disk`."""
    return (directory / "dataset_dict.json").is_file() or (directory / "state.json").is_file()


def _require_train(source: str, split: str) -> None:
    if split != "train":
        raise VarpiError(f"{source}: no split {split!r}; data without splits is split 'train'")


def _expand(source: str) -> Iterator[Path]:
    """The files that `source` names between commas, by globs, braces, or the directories they lie in.

    Raises:
        VarpiError: one of them is not there, or a glob matches none.
    """
    for part in _COMMA.split(source):
        for name in _braces(part.strip()):
            path = Path(name).expanduser()
            if path.is_dir():
                files = listed.paths if (listed := _listed(path)) else sorted(path.glob("*.parquet"))
            elif path.is_file() or not glob.has_magic(name):
                files = [path] if path.is_file() else []
            else:
                files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
                if not files:
                    raise VarpiError(f"{name}: no file matches this pattern")
            if not files:
                raise VarpiError(f"{name}: no such file, or no data in it; {source!r} names it")
            yield from files


def _braces(text: str) -> Iterator[str]:
    """`{0..3}` and `{a,b}` written out, but not one in the other; numbers are as wide as the first of their range."""
    match = _BRACES.search(text)
    if match is None:
        yield text
        return
    if numbers := _RANGE.fullmatch(match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        if not 0 <= last - first < _MOST_FILES:
            raise VarpiError(f"{text}: {match[0]} must count upwards, to at most {_MOST_FILES} files")
        choices = (f"{number:0{len(numbers[1])}}" for number in range(first, last + 1))
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _braces(f"{text[: match.start()]}{choice}{text[match.end() :]}")
