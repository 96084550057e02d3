"""A recipe's data, opened: as batches for a run, and as a dataset to look into."""

from typing import Any

from varpi.data import Batches, Dataset, open_dataset
from varpi.data.stream import SHUFFLE_BUFFER, StreamBatches
from varpi.recipe import DataSection, Recipe
from varpi.runtime.processes import World


def open_batches(recipe: Recipe, world: World) -> Batches | StreamBatches:
    """This process's part of the batches of a run."""
    data = recipe.data
    run: dict[str, Any] = {
        "batch_size": recipe.training.batch_size,
        "seed": recipe.seed,
        "rank": world.rank,
        "world_size": world.size,
        "workers": data.workers,
        "max_bad_fraction": data.max_bad_fraction,
    }
    if not data.stream:
        return Batches(open_split(data, data.split), **run)
    return StreamBatches.open(
        data.source,
        image_size=data.image_size,
        split=data.split,
        image_column=data.image_column,
        label_column=data.label_column,
        caption_column=data.caption_column,
        min_side=data.min_side,
        shuffle_buffer=data.shuffle_buffer or SHUFFLE_BUFFER,
        **run,
    )


def open_split(data: DataSection, split: str) -> Dataset:
    """One split, with random access."""
    return open_dataset(
        data.source,
        image_size=data.image_size,
        split=split,
        image_column=data.image_column,
        label_column=data.label_column,
        caption_column=data.caption_column,
        caption_features=data.caption_features,
        min_side=data.min_side,
    )
