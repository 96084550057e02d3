"""Scenes of coloured shapes: what is in each, as drawn by its split and number, and the sentence that asks for it.

The sentences are GenEval's (Ghosh et al. 2023, arXiv 2310.11513), in its six kinds, about shapes instead of COCO's
objects. Lengths are shares of the image's side, x to the right and y down from the upper left corner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from varpi.data.prompts import GENEVAL_RELATIONS, GENEVAL_TASKS
from varpi.runtime.randomness import Stream, words

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SHAPE_COLORS = {
    "red": (0.85, 0.10, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.97, 0.90, 0.15),
    "green": (0.12, 0.62, 0.20),
    "blue": (0.13, 0.25, 0.90),
    "purple": (0.48, 0.12, 0.65),
    "pink": (1.00, 0.60, 0.78),
    "black": (0.05, 0.05, 0.05),
    "white": (0.97, 0.97, 0.97),
}
"""GenEval's colours with red, green and blue in [0, 1], but for brown, which the dull backgrounds come close to."""
HELD_OUT_PAIRS = frozenset((SHAPES[i % len(SHAPES)], color) for i, color in enumerate(SHAPE_COLORS))
"""Shapes and colours never together in training: each colour with one shape, each shape with one or two colours."""
SCENES = {"train": 2**20, "validation": 1200, "test": 6000, "held_out": 2000, "every": 2**20}
"""Splits and how many scenes each has. In held_out all pairs of shape and colour are of `HELD_OUT_PAIRS`, in train,
validation and test none; every has them all, for detectors, which must not favour what generators were shown."""

_SPLITS = tuple(SCENES)
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_MARGIN = 0.03
"""Between a shape and the edge of its part of the image."""
T = TypeVar("T")


@dataclass(frozen=True)
class Pattern:
    """A pattern in [-1, 1] over the plane."""

    kind: str
    """plain, shade (from one side to the other), stripes, checks, or clouds."""
    angle: float
    """In radians, of the direction in which it changes."""
    period: float
    phase: float


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    shape: str
    color: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    """Of its centre."""
    size: float
    """Side of the square that the shape fills."""
    texture: Pattern
    contrast: float
    """By which the texture makes it brighter and darker."""


@dataclass(frozen=True)
class Scene:
    task: str
    """One of GENEVAL_TASKS."""
    things: tuple[Thing, ...]
    """In the order of its metadata."""
    relation: str
    """How the second thing stands to the first, one of GENEVAL_RELATIONS; for the task position."""
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    """The background's colours."""
    background: Pattern


def draw_scene(split: str, index: int) -> Scene:
    """The scene of a number in [0, 2**64) of a split of `SCENES`. The tasks take turns."""
    held_out = split == "held_out"
    tasks = ("colors", "color_attr") if held_out else GENEVAL_TASKS
    task = tasks[index % len(tasks)]
    draws = _Draws(words(0, Stream.SCENES, (_SPLITS.index(split), index, 0), 96))
    relation = draws.choose(GENEVAL_RELATIONS)
    if task in ("single_object", "colors"):
        cells, sizes, count = [(0.0, 0.0, 1.0, 1.0)], (0.36, 0.64), 1
    elif task == "counting":
        count = 2 + draws.below(3)
        cells, sizes = draws.shuffled([(i / 2, j / 2, 0.5, 0.5) for i in range(2) for j in range(2)]), (0.30, 0.40)
    else:
        # The first lies right of the second, or below it, when the relation says that the second is left or above
        start, across = (0.5, 0.0) if relation in ("left of", "above") else (0.0, 0.5), draws.between(0, 0.45)
        wide = 0.55 if task == "position" else 1.0  # a narrower band: one direction is then clear
        band = across if task == "position" else 0.0
        if relation in ("left of", "right of"):
            cells = [(first, band, 0.5, wide) for first in start]
        else:
            cells = [(band, first, wide, 0.5) for first in start]
        sizes, count = (0.30, 0.42), 2
    pairs = _held_out_pairs(draws, count) if held_out else _pairs(draws, task, count, split == "every")
    things = tuple(_thing(draws, *pair, cell, sizes) for pair, cell in zip(pairs, cells, strict=False))
    gray = draws.between(0.34, 0.66)
    low = _around(draws, (gray, gray, gray), 0.05)
    step = draws.between(-0.12, 0.12)
    high = _around(draws, (low[0] + step, low[1] + step, low[2] + step), 0.03)
    return Scene(task, things, relation, low, high, _pattern(draws, (0.2, 0.5)))


def caption_of(scene: Scene) -> str:
    """GenEval's sentence for a scene."""
    first = scene.things[0]
    match scene.task:
        case "counting":
            return f"a photo of {_NUMBERS[len(scene.things)]} {plural(first.shape)}"
        case "colors":
            return f"a photo of {_named(first, True)}"
        case "position":
            return f"a photo of {_named(scene.things[1], False)} {scene.relation} {_named(first, False)}"
        case _:
            return "a photo of " + " and ".join(_named(thing, scene.task == "color_attr") for thing in scene.things)


def metadata_of(scene: Scene) -> dict[str, Any]:
    """What GenEval's metadata would say of a scene's caption, as `read_geneval_metadata` describes it."""
    if scene.task == "counting":
        name, count = scene.things[0].shape, len(scene.things)
        wanted = {"include": [{"class": name, "count": count}], "exclude": [{"class": name, "count": count + 1}]}
    else:
        colored = scene.task in ("colors", "color_attr")
        include: list[dict[str, Any]] = [
            {"class": thing.shape, "count": 1, **({"color": thing.color} if colored else {})} for thing in scene.things
        ]
        if scene.task == "position":
            include[1]["position"] = [scene.relation, 0]
        wanted = {"include": include}
    return {"tag": scene.task, **wanted, "prompt": caption_of(scene)}


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _named(thing: Thing, colored: bool) -> str:
    words_of = f"{thing.color} {thing.shape}" if colored else thing.shape
    return f"{'an' if words_of[0] in 'aeiou' else 'a'} {words_of}"


class _Draws:
    """Numbers drawn one after the other. Made of raw words, because NumPy keeps those the same."""

    def __init__(self, raw: np.ndarray) -> None:
        self._uniform = iter(((raw >> np.uint64(11)) * 2.0**-53).tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._uniform)

    def below(self, count: int) -> int:
        return int(count * next(self._uniform))

    def choose(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in options]


_HELD_OUT = tuple(sorted(HELD_OUT_PAIRS))


def _held_out_pairs(draws: _Draws, count: int) -> list[tuple[str, str]]:
    """One or two, of two shapes; of two colours then too, for each colour has one pair."""
    order = draws.shuffled(_HELD_OUT)
    return [order[0], next(pair for pair in order if pair[0] != order[0][0])][:count]


def _pairs(draws: _Draws, task: str, count: int, every: bool) -> list[tuple[str, str]]:
    """Shape and colour of each thing: one shape for counting, else as many as things; for color_attr colours too.

    every: of all pairs, not only of those that are not held out.
    """
    shapes = draws.shuffled(SHAPES)
    found: list[tuple[str, str]] = []
    for i in range(count):
        shape = shapes[0 if task == "counting" else i]
        taken = {color for _, color in found} if task == "color_attr" else set()
        options = [color for color in SHAPE_COLORS if color not in taken]
        if not every:
            options = [color for color in options if (shape, color) not in HELD_OUT_PAIRS]
        found.append((shape, draws.choose(options)))
    return found


def _thing(
    draws: _Draws, shape: str, color: str, cell: tuple[float, float, float, float], sizes: tuple[float, float]
) -> Thing:
    """A thing somewhere in a cell: left, upper edge, width, height."""
    size = draws.between(*sizes)
    room = size / 2 + _MARGIN
    return Thing(
        shape,
        color,
        _around(draws, SHAPE_COLORS[color], 0.04),
        x=draws.between(cell[0] + room, cell[0] + cell[2] - room),
        y=draws.between(cell[1] + room, cell[1] + cell[3] - room),
        size=size,
        texture=_pattern(draws, (0.11, 0.16)),
        contrast=draws.between(0.04, 0.10),
    )


def _around(draws: _Draws, rgb: tuple[float, float, float], far: float) -> tuple[float, float, float]:
    red, green, blue = (min(max(part + draws.between(-far, far), 0.0), 1.0) for part in rgb)
    return red, green, blue


def _pattern(draws: _Draws, periods: tuple[float, float]) -> Pattern:
    kind = draws.choose(("plain", "shade", "stripes", "checks", "clouds"))
    return Pattern(kind, draws.between(0, np.pi), draws.between(*periods), draws.between(0, 2 * np.pi))
