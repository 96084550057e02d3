"""Class ids: which number each of a source's named classes has.

A number means a class only by the names behind it. They come, in this order, from `data.classes`, from the generator
that is trained on, from ImageNet's list where they are WordNet ids, or else the source's names are numbered as they
stand.
"""

import importlib.resources
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from varpi.errors import VarpiError

Classes = str | Path | Sequence[str]
"""Names in the order of their ids: a list, a file with one a line, or "imagenet"."""
IMAGENET = "imagenet"


@lru_cache(maxsize=1)
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """WordNet id and first name of ImageNet's 1000 classes, in the order of their ids."""
    text = (importlib.resources.files("varpi.data") / "imagenet_classes.txt").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return tuple((wordnet_id, name) for wordnet_id, name in rows)


def wordnet_ids() -> tuple[str, ...]:
    """Of ImageNet's 1000 classes."""
    return tuple(wordnet_id for wordnet_id, _ in imagenet_classes())


def readable(names: Sequence[str]) -> list[str]:
    """Names of classes for people: in the place of ImageNet's WordNet ids their first names."""
    known = dict(imagenet_classes())
    return [known.get(name, name) for name in names]


def read_classes(classes: Classes) -> tuple[str, ...]:
    """The names, in the order of their ids.

    Raises:
        VarpiError: a file that cannot be read, no names, an empty one, or the same one twice.
    """
    if isinstance(classes, str | Path):
        if classes == IMAGENET:
            return wordnet_ids()
        where, path = str(classes), Path(classes).expanduser()
        try:
            names = tuple(path.read_text(encoding="utf-8-sig").splitlines()) if path.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise VarpiError(f"{where}: cannot be read as a list of classes ({error})") from error
        if names is None:
            raise VarpiError(f"{where}: no such file; classes are a list, a file with a name a line, or {IMAGENET!r}")
    else:
        where, names = "classes", tuple(classes)
    if not names:
        raise VarpiError(f"{where}: names no class")
    seen: set[str] = set()
    for number, name in enumerate(names):
        if not name or name in seen:
            problem = f"is the same as an earlier one ({name!r})" if name else "is empty"
            raise VarpiError(f"{where}: the name of class {number} {problem}; every class needs one of its own")
        seen.add(name)
    return names


def number_classes(
    names: Sequence[str], known: Sequence[str] | None, where: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The id of each of a source's classes, and the names of all classes in the order of their ids.

    names: what the source calls its classes, in its own order. known: what they are called where the ids come from.

    Raises:
        VarpiError: a name that is not among those `known`, or twice the same.
    """
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise VarpiError(f"{where}: names two classes {twice!r}")
    if known is None and set(names) <= set(wordnet_ids()):
        known = wordnet_ids()
    if known is None:
        return tuple(range(len(names))), tuple(names)
    ids = {name: number for number, name in enumerate(known)}
    if strange := [name for name in names if name not in ids]:
        few = ", ".join(strange[:3]) + (", …" if len(strange) > 3 else "")
        raise VarpiError(
            f"{where}: {len(strange)} of its {len(names)} classes ({few}) are none of the {len(known)} known ones "
            f"({', '.join(known[:3])}, …), which data.classes or the generator names; set data.classes to the names "
            "that the data has, in the order of the generator's ids"
        )
    return tuple(ids[name] for name in names), tuple(known)


def check_subset(class_names: Sequence[str], num_classes: int, where: str) -> None:
    """Refuse data whose named classes are fewer than the `num_classes` of a generator that has no names for its own."""
    if len(class_names) >= num_classes:
        return
    few = ", ".join(class_names[:3])
    raise VarpiError(
        f"{where} names {len(class_names)} classes ({few}, …), the generator knows {num_classes} and no names for "
        "them, so that which ones these are is not told; set data.classes to the names of all of them (or give them by "
        f"--class-names) in the order of their ids: a file, a list, or {IMAGENET!r}"
    )
