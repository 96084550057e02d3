"""A recipe's data, opened: as batches for a run, and as a dataset to look into."""

from collections.abc import Sequence
from typing import Any

from varpi.data import Batches, Dataset, open_dataset
from varpi.data.lanes import Lanes
from varpi.data.mirrored import Mirrored
from varpi.data.source import locate
from varpi.data.stream import SHUFFLE_BUFFER, FirstRows, StreamBatches
from varpi.errors import VarpiError
from varpi.recipe import DataSection, Recipe
from varpi.runtime.processes import World

AnyBatches = Batches | StreamBatches | Lanes


def open_batches(recipe: Recipe, world: World, classes: Sequence[str] | None = None) -> AnyBatches:
    """This process's part of the batches of a run.

    classes: what the generator calls its classes, where it has names for them; data.classes goes first.
    """
    data = recipe.data
    run: dict[str, Any] = {
        "batch_size": recipe.training.batch_size,
        "seed": recipe.seed,
        "workers": data.workers,
        "max_bad_fraction": data.max_bad_fraction,
    }
    if not data.stream:
        return Batches(open_training_data(data, classes), **run, rank=world.rank, world_size=world.size)

    def stream(number: int, count: int) -> StreamBatches:
        return StreamBatches.open(
            data.source,
            **_asked(data, data.split, classes),
            shuffle_buffer=data.shuffle_buffer or SHUFFLE_BUFFER,
            **run,
            rank=number,
            world_size=count,
        )

    if data.lanes is None:
        return stream(world.rank, world.size)
    return Lanes(stream, data.lanes, rank=world.rank, world_size=world.size)


def open_training_data(data: DataSection, classes: Sequence[str] | None = None) -> Dataset:
    """What a run trains on, with random access, its indices those of the batches. classes: as for `open_batches`."""
    dataset = open_split(data, data.split, classes)
    return Mirrored(dataset) if data.flip else dataset


def open_split(data: DataSection, split: str, classes: Sequence[str] | None = None) -> Dataset:
    """One split, with random access. classes: as for `open_batches`."""
    return open_dataset(data.source, **_asked(data, split, classes), caption_features=data.caption_features)


def open_held_out(recipe: Recipe, split: str, batches: AnyBatches, images: int | None = None) -> Dataset:
    """The images that validate, their classes numbered as those of the batches.

    images: so many will be looked at, or None for all. Of a table that is streamed they are its first ones, for with
        random access all of it would be fetched, and the training images with it.

    Raises VarpiError when it names its classes and the batches have bare numbers, and for all images of a stream from
    the Hub.
    """
    data = recipe.data
    kind = locate(data.source, split).kind if data.stream else None
    if kind == "hub" and images is None:
        raise VarpiError(f"{data.source} is streamed; say how many images of split {split!r} are to be read (images)")
    if kind in ("hub", "parquet") and images is not None:
        held_out: Any = FirstRows(data.source, images, **_asked(data, split, batches.class_names))
    else:
        held_out = open_split(data, split, batches.class_names)
    if held_out.class_names != batches.class_names:
        raise VarpiError(
            f"{recipe.data.source}: split {split!r} names its classes, split {recipe.data.split!r} does not, so that "
            "which number is which class is not told; set data.classes"
        )
    return held_out


def _asked(data: DataSection, split: str, classes: Sequence[str] | None) -> dict[str, Any]:
    return {
        "image_size": data.image_size,
        "split": split,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "caption_column": data.caption_column,
        "min_side": data.min_side,
        "classes": data.classes or classes,
    }
