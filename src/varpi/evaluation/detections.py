"""What a detector saw in images, for GenEval: looked for, kept in a cache, and in files.

Any detector may have made the files; `varpi.networks` has one, `mask2former`, and one who names colours, in `clip`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from varpi.data.images import decode
from varpi.data.prompts import GENEVAL_COLORS
from varpi.errors import VarpiError
from varpi.runtime.files import read_text, write_text
from varpi.runtime.tensors import sha256_of

Boxes = Mapping[str, Sequence[Sequence[float]]]
"""By class, [x1, y1, x2, y2, score] of each detection, in pixels from the upper left corner."""
Colors = Mapping[str, Sequence[str | None]]
"""By class, the colour of each detection, in the order of its boxes; None where nobody looked."""


class Found(NamedTuple):
    """What a detector saw in one image."""

    detections: Boxes
    colors: Colors


class Detector(Protocol):
    """Finds objects; `Mask2FormerDetector` is one."""

    label: str
    """What the scores by it are called."""
    source: str
    """Where its weights come from, for people."""
    identity: Mapping[str, Any]
    """What its detections depend on."""

    def __call__(self, image: Image.Image) -> tuple[dict[str, list[list[float]]], dict[str, np.ndarray]]:
        """Boxes and masks (bool, (n, H, W)) by class of an RGB image."""
        ...


class Colorist(Protocol):
    """Names colours; `ClipColorist` is one."""

    source: str
    identity: Mapping[str, Any]

    def __call__(self, image: Image.Image, name: str, boxes: Sequence[Sequence[float]], masks: np.ndarray) -> list[str]:
        """The colour of each detection of the class `name`, one of GENEVAL_COLORS."""
        ...


def read_detections(path: str | Path) -> dict[str, Found]:
    """Detections in a JSON file: {"00000/samples/0000.png": {"detections": Boxes, "colors": Colors}, …}.

    `colors` may be left out of images whose prompt asks for none. Paths may have more before these three parts.
    Raises VarpiError for a file that cannot be read or is not so.
    """
    path = Path(path).expanduser()
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise VarpiError(f"{path}: cannot be read as a JSON file of detections ({error})") from error
    if not isinstance(content, dict):
        raise VarpiError(f"{path}: is a JSON {type(content).__name__}; expected an object with a key for each image")
    found = {"/".join(Path(name).parts[-3:]): _found(value, f"{path}: {name:.200}") for name, value in content.items()}
    if len(found) != len(content):
        raise VarpiError(f"{path}: holds two images with the same last three parts; keep one set of samples in a file")
    return found


def write_detections(path: str | Path, found: Mapping[str, Found]) -> None:
    """Write detections in the form that `read_detections` reads."""
    write_text(path, json.dumps({name: one._asdict() for name, one in found.items()}) + "\n")


def _found(value: Any, where: str) -> Found:
    """Detections from JSON, checked."""
    if not isinstance(value, dict) or not isinstance(value.get("detections"), dict):
        raise VarpiError(f"{where}: has no detections; expected {{'detections': {{class: boxes}}, 'colors': …}}")
    detections, colors = value["detections"], value.get("colors", {})
    for name, boxes in detections.items():
        for box in boxes if isinstance(boxes, list) else [boxes]:
            if not isinstance(box, list) or len(box) != 5 or not all(_is_number(part) for part in box):
                raise VarpiError(f"{where}: {name!r:.80} has the box {box!r:.80}; expected [x1, y1, x2, y2, score]")
    for name, seen in colors.items() if isinstance(colors, dict) else [("", colors)]:
        if not isinstance(seen, list) or len(seen) != len(detections.get(name, [])):
            raise VarpiError(
                f"{where}: the colours of {name!r:.80} are {seen!r:.80}; expected one for each of its boxes"
            )
        if unknown := [color for color in seen if color is not None and color not in GENEVAL_COLORS]:
            raise VarpiError(f"{where}: {unknown[0]!r:.80} is none of GenEval's colours ({', '.join(GENEVAL_COLORS)})")
    return Found(detections, colors)


def _is_number(part: Any) -> bool:
    return isinstance(part, (int, float)) and math.isfinite(part)


def detect(
    root: Path,
    asked: Mapping[Path, set[str]],
    *,
    detector: Detector,
    colorist: Colorist | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Found]:
    """Look for objects in images, and for the colours of some classes.

    asked: the images, files below `root`, each with the classes whose colours are needed.
    cache: a JSON-lines file that takes each image's detections as they are made; what it holds already of an unchanged
        image is not made again, so an interrupted run goes on.
    progress: show a bar on stderr.

    Returns what was found by path, relative to `root`. Raises VarpiError when colours are needed and there is no
    colorist, and for a cache that is damaged or of another detector.
    """
    if colorist is None and any(asked.values()):
        raise VarpiError("some of the prompts ask for colours: give a colorist too")
    store = _Cache.open(cache, detector, colorist)
    found: dict[str, Found] = {}
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        for path, classes in bar.track(asked.items(), total=len(asked), description="detecting objects"):
            name, digest = path.relative_to(root).as_posix(), sha256_of(path)
            known = store.known.get((name, digest))
            if known is None or not classes <= known.colors.keys():
                known = _look(path, detector, colorist, classes)
                store.add(name, digest, known)
            found[name] = known
    return found


def _look(path: Path, detector: Detector, colorist: Colorist | None, asked: set[str]) -> Found:
    image = decode(path, str(path))
    boxes, masks = detector(image)
    colors: dict[str, list[str | None]] = {name: [] for name in sorted(asked)}
    for name in asked & boxes.keys():
        assert colorist is not None
        colors[name] = [*colorist(image, name, boxes[name], masks[name])]
    return Found(boxes, colors)


@dataclass
class _Cache:
    """Detections on disk, a line an image; the first line says whose they are."""

    known: dict[tuple[str, str], Found]
    """By path and SHA-256 of the image."""
    path: Path | None

    @classmethod
    def open(cls, path: str | Path | None, detector: Detector, colorist: Colorist | None) -> "_Cache":
        if path is None:
            return cls({}, None)
        path = Path(path).expanduser()
        # Through JSON and back, as what stands in the file has gone
        head = json.loads(json.dumps({"detector": detector.identity, "colorist": colorist and colorist.identity}))
        if not path.exists():
            write_text(path, json.dumps(head) + "\n")
            return cls({}, path)
        try:
            lines = read_text(path).split("\n")
            values = [json.loads(line) for line in lines[:-1]]
            known = {(v["image"], v["sha256"]): _found(v, f"{path}: {v['image']}") for v in values[1:]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise VarpiError(f"{path}: is not a cache of detections, or damaged ({error}); remove it") from error
        if values[:1] != [head]:
            raise VarpiError(f"{path}: holds the detections of another detector or colorist; name another cache")
        if lines[-1]:  # cut off in the middle of a line: it is made again
            write_text(path, "".join(f"{line}\n" for line in lines[:-1]))
        return cls(known, path)

    def add(self, name: str, digest: str, found: Found) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"image": name, "sha256": digest, **found._asdict()}) + "\n")
