"""Captioned shapes: a data set without end or download, drawn by numbers, that GenEval's rules can judge."""

import hashlib
from typing import Any

import torch

from varpi.data.dataset import Item
from varpi.data.rendering import box_of, render_scene
from varpi.data.scenes import SCENES, Scene, caption_of, draw_scene, metadata_of
from varpi.errors import VarpiError

SHAPES_SIZES = (32, 64)
_VERSION = 1
"""Another number for other scenes or pixels."""


class CaptionedShapes:
    """One to four coloured, textured shapes on dull backgrounds, with GenEval's sentences of six kinds.

    A scene depends on its split and index alone. In the split "held_out" every colour is one that its shape never has
    in "train", "validation" and "test", and is asked for (tasks colors and color_attr); "every" is for detectors.

    Args:
        split: one of `SCENES`.
        image_size: 32 or 64: the same scenes, in finer pixels.

    Raises:
        VarpiError: another split or image size.
    """

    num_classes = None
    class_names = None

    def __init__(self, *, split: str = "train", image_size: int = 32) -> None:
        if split not in SCENES:
            raise VarpiError(f"shapes: no split {split!r}; it has {', '.join(SCENES)}")
        if image_size not in SHAPES_SIZES:
            raise VarpiError(f"shapes: image_size is {image_size}; shapes are drawn at 32 or 64 pixels")
        self.split = split
        self.image_size = image_size

    @property
    def fingerprint(self) -> str:
        what = f"shapes {_VERSION} {self.split} {len(self)} {self.image_size}"
        return hashlib.sha256(what.encode()).hexdigest()

    def __len__(self) -> int:
        return SCENES[self.split]

    def __getitem__(self, index: int) -> Item:
        scene = self.scene(index)
        pixels = torch.from_numpy(render_scene(scene, self.image_size)).permute(2, 0, 1)
        return Item(pixels.float() / 127.5 - 1, caption_of(scene))

    def scene(self, index: int) -> Scene:
        return draw_scene(self.split, index)

    def caption(self, index: int) -> str:
        return caption_of(self.scene(index))

    def name(self, index: int) -> str:
        return f"shapes row {index}"

    def key(self, index: int) -> str:
        return f"rows/{index}"

    def geneval_metadata(self, index: int) -> dict[str, Any]:
        """What an image must show that follows the caption, a line of GenEval's metadata."""
        return metadata_of(self.scene(index))

    def exact_detections(self, index: int) -> tuple[dict[str, list[list[float]]], dict[str, list[str]]]:
        """What a faultless detector would see: boxes [x1, y1, x2, y2, 1] in pixels, and colours, by shape."""
        boxes: dict[str, list[list[float]]] = {}
        colors: dict[str, list[str]] = {}
        for thing in self.scene(index).things:
            boxes.setdefault(thing.shape, []).append([*box_of(thing, self.image_size), 1.0])
            colors.setdefault(thing.shape, []).append(thing.color)
        return boxes, colors
