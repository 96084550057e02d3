"""What a generator's classes are called: kept in its file, held against the names of the data."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open

from varpi.data.classes import check_subset, wordnet_ids
from varpi.data.opening import AnyBatches
from varpi.errors import VarpiError
from varpi.recipe import Recipe
from varpi.runtime.files import line
from varpi.runtime.sources import EMBEDDED, Source, embedded, find

KEY = "classes"
"""Of the metadata of a safetensors file: a JSON list of names, in the order of the ids."""

logger = logging.getLogger(__name__)


def read_class_names(metadata: Mapping[str, str], where: str) -> tuple[str, ...] | None:
    """The names in a file's metadata; None where it has none. Raises VarpiError for anything but a list of names."""
    if KEY not in metadata:
        return None
    try:
        names = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        names = None
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise VarpiError(f"{where}: its metadata {KEY!r} is not a JSON list of class names")
    return tuple(names)


def class_names_metadata(model: Any) -> dict[str, str]:
    """The metadata that keep a model's class names, if it has any."""
    names = getattr(model, "class_names", None)
    return {} if names is None else {KEY: json.dumps(names)}


def stored_class_names(source: Source | None) -> tuple[str, ...] | None:
    """What the generator at `source` calls its classes, without reading its weights; None where that is not stored."""
    if source is None or isinstance(source, Mapping):
        return None
    path = find(embedded(source, "generator") if isinstance(source, str) and source in EMBEDDED else source)
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise VarpiError(f"{path}: not a readable safetensors file, truncated perhaps ({line(error)})") from error
    return read_class_names(metadata, str(path))


def known_class_names(recipe: Recipe) -> tuple[str, ...] | None:
    """What the generator that a recipe begins with calls its classes; None where that is not known."""
    return None if recipe.generator is None else stored_class_names(recipe.generator.source)


def name_classes(generator: Any, recipe: Recipe, batches: AnyBatches) -> None:
    """Give a class-conditional generator the names of the classes it is trained on.

    Raises VarpiError where the data names fewer classes than the generator knows and nothing says which they are.
    """
    names = batches.class_names
    if names is None or generator.num_classes is None:
        return
    source = None if recipe.generator is None else recipe.generator.source
    if recipe.data.classes is None and generator.class_names is None and source is not None:
        check_subset(names, generator.num_classes, recipe.data.source)
        if names != wordnet_ids() and any(name != str(number) for number, name in enumerate(names)):
            logger.warning(
                "%s has no names for its classes; those of %s are taken in its order: 0 is %s, 1 is %s, …",
                *(source, recipe.data.source, *names[:2]),
            )
    generator.class_names = names
