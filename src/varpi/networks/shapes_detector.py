"""Finds coloured shapes in small images: a `SmallConvNet` whose head is read at every cell of its last map.

Shapes: B images, h x w cells. The outputs of a cell are the logits of "nothing here" and of each of SHAPES, those of
each colour, and the left, upper, right and lower edge of the shape's box, as seen from the cell's centre, in strides.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varpi.data.pixels import from_uint8
from varpi.data.scenes import SHAPE_COLORS, SHAPES
from varpi.errors import VarpiError
from varpi.networks.convnet import SmallConvNet, load_classifier
from varpi.runtime.sources import embedded
from varpi.runtime.tensors import sha256_of

DETECTOR_OUTPUTS = 1 + len(SHAPES) + len(SHAPE_COLORS) + 4
_COLORS = tuple(SHAPE_COLORS)
_SIDE = 32
_OVERLAP = 0.4
"""Intersection over union from which on two boxes are of one shape."""


class Cells(NamedTuple):
    """What the network says of every cell."""

    shapes: Tensor
    """Logits (B,h,w,1 + shapes); 0 is "nothing here"."""
    colors: Tensor
    """Logits (B,h,w,colours)."""
    boxes: Tensor
    """Left, upper, right, lower edge in pixels (B,h,w,4)."""


def read_cells(network: SmallConvNet, images: Tensor) -> Cells:
    """images (B,3,H,W) in [-1,1]; float32 out."""
    outputs = network.head(network.maps(images)[-1].permute(0, 2, 3, 1)).float()
    shapes, colors, edges = outputs.split([1 + len(SHAPES), len(SHAPE_COLORS), 4], dim=-1)
    stride = images.shape[-1] // outputs.shape[2]
    x, y = cell_centres(outputs.shape[1:3], stride, images.device)
    centres = torch.stack(torch.broadcast_tensors(x, y, x, y), dim=-1)
    return Cells(shapes, colors, centres + stride * edges)


def cell_centres(grid: Sequence[int], stride: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """x (1,w) and y (h,1) of the cells' centres, in pixels."""
    y, x = ((torch.arange(count, device=device) + 0.5) * stride for count in grid)
    return x[None], y[:, None]


class ShapesDetector:
    """GenEval's detector for the captioned shapes, 32x32 pixels; `ShapesColorist` names the colours of what it finds.

    The score of a detection is the probability of its shape; of boxes that overlap by more than 0.4 the best is kept.

    Args:
        weights: a file of the recipe shapes-detector; by default the embedded one.
        floor: scores up to this are left out; GenEval's rules look at none below 0.3.
    """

    label = "shapes detector"

    def __init__(
        self, weights: str | os.PathLike[str] | None = None, *, device: str = "cpu", floor: float = 0.1
    ) -> None:
        path = embedded("shapes", "detector") if weights is None else Path(weights)
        self._network = load_classifier(path, device)
        if self._network.num_classes != DETECTOR_OUTPUTS:
            raise VarpiError(
                f"{path}: has {self._network.num_classes} outputs; a detector of shapes has {DETECTOR_OUTPUTS}"
            )
        self._device = device
        self.floor = floor
        self.source = "embedded" if weights is None else str(weights)
        self.identity: Mapping[str, Any] = {"model": "shapes-detector", "sha256": sha256_of(path), "floor": floor}

    def __call__(self, image: Image.Image) -> tuple[dict[str, list[list[float]]], dict[str, np.ndarray]]:
        """Boxes [x1, y1, x2, y2, score] by shape, and masks, bool (n, H, W), of the pixels in them, of an RGB image.

        Raises VarpiError for another size than 32x32.
        """
        cells = self.cells(image)
        scores, kinds = cells.shapes.softmax(-1)[0, :, :, 1:].max(-1)
        edges = cells.boxes[0].clamp(0, _SIDE)
        boxes: dict[str, list[list[float]]] = {}
        kept: list[list[float]] = []
        for place in scores.flatten().argsort(descending=True).tolist():
            score, box = float(scores.flatten()[place]), edges.flatten(0, 1)[place].tolist()
            if score <= self.floor:
                break
            if box[0] < box[2] and box[1] < box[3] and all(_overlap(box, other) <= _OVERLAP for other in kept):
                kept.append(box)
                boxes.setdefault(SHAPES[int(kinds.flatten()[place])], []).append([*box, score])
        return boxes, {name: np.stack([_mask(box) for box in several]) for name, several in boxes.items()}

    @torch.inference_mode()
    def cells(self, image: Image.Image) -> Cells:
        if image.size != (_SIDE, _SIDE):
            raise VarpiError(
                f"an image of {image.size[0]}x{image.size[1]} pixels; the detector of shapes knows {_SIDE}x{_SIDE}"
            )
        pixels = np.array(image.convert("RGB"))[None]
        return read_cells(self._network, from_uint8(pixels).to(self._device))


class ShapesColorist:
    """Names the colours of shapes, by the detector's own network, at the middle of each box."""

    def __init__(self, detector: ShapesDetector) -> None:
        self._detector = detector
        self.source = detector.source
        self.identity: Mapping[str, Any] = {**detector.identity, "model": "shapes-colorist"}

    def __call__(self, image: Image.Image, name: str, boxes: Sequence[Sequence[float]], masks: np.ndarray) -> list[str]:
        """The colour of each detection, one of SHAPE_COLORS."""
        colors = self._detector.cells(image).colors[0]
        height, width = colors.shape[:2]
        found = []
        for left, upper, right, lower, *_ in boxes:
            row = min(int((upper + lower) / 2 * height / _SIDE), height - 1)
            column = min(int((left + right) / 2 * width / _SIDE), width - 1)
            found.append(_COLORS[int(colors[row, column].argmax())])
        return found


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes that are not empty."""
    wide = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    high = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return wide * high / (areas - wide * high)


def _mask(box: Sequence[float]) -> np.ndarray:
    """Bool (32, 32): pixels whose centre is in the box."""
    places = np.arange(_SIDE) + 0.5
    return ((places > box[1]) & (places < box[3]))[:, None] & ((places > box[0]) & (places < box[2]))[None]
