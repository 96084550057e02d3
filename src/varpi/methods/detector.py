"""Trains a detector of shapes, on scenes of which everything is known: what GenEval's rules judge generated images by.

A cell of the network's last map answers for a shape when the shape's centre lies in it, as in YOLO (arXiv 1506.02640).
Cells beside it, up to a stride from the centre, learn its box and colour but not whether they should speak: which of
them is nearest is a matter of less than a pixel.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from varpi.data import Batch
from varpi.data.opening import open_split
from varpi.data.rendering import box_of
from varpi.data.scenes import SHAPE_COLORS, SHAPES
from varpi.data.shapes import CaptionedShapes
from varpi.methods import Outcome
from varpi.methods.classifier import check_stages
from varpi.networks.convnet import SmallConvNet, save_classifier
from varpi.networks.shapes_detector import DETECTOR_OUTPUTS, Cells, cell_centres, read_cells
from varpi.recipe import Int, MethodSection, Recipe
from varpi.runtime.processes import autocast
from varpi.runtime.stages import Stages

_ANSWERS = 0.5625
"""How far, in strides, the centre of a shape may be from that of a cell that answers for it."""
_COLORS = tuple(SHAPE_COLORS)


class Settings(MethodSection):
    """Trains a detector of the captioned shapes, which judges or rewards."""

    channels: Annotated[tuple[Annotated[Int, Field(ge=1, le=2**12)], ...], Field(min_length=1, max_length=8)] = (
        24,
        48,
        96,
    )
    """Width of each stage; a cell of the last is 2^(stages - 1) pixels wide."""

    def check(self, recipe: Recipe) -> None:
        if recipe.data.source != "shapes":
            raise ValueError(
                f"data.source is {recipe.data.source}; method detector learns from scenes it knows: shapes"
            )
        check_stages(self.channels, recipe)


class ShapesDetection:
    """train, held_out: the scenes that batches are of, in training and in validation."""

    def __init__(
        self,
        network: SmallConvNet,
        train: CaptionedShapes,
        held_out: CaptionedShapes | None = None,
        *,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        self.model: Any = network
        self.train = train
        self.held_out = held_out
        self.precision = precision
        self.device = device
        self.frozen: tuple[Any, ...] = ()
        self.stages = Stages(device)

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        """Cross-entropy of shapes over the cells for each that answers, that of colours, and the boxes' error."""
        self.model.train()
        with self.stages("detector"), autocast(self.device, self.precision):
            cells = read_cells(self.model, batch.images)
        shape, color, box = self._losses(cells, batch, self.train)
        metrics = {"shape": shape.detach(), "color": color.detach(), "box": box.detach()}
        return Outcome(shape + color + box, metrics)

    def validation_loss(self, batch: Batch) -> Tensor:
        self.model.eval()
        assert self.held_out is not None
        return sum(self._losses(read_cells(self.model, batch.images), batch, self.held_out), torch.zeros(()))

    def save(self, path: Path, state_dict: dict[str, Tensor], extra: dict[str, str]) -> None:
        save_classifier(self.model, path, state_dict, extra)

    def _losses(self, cells: Cells, batch: Batch, data: CaptionedShapes) -> tuple[Tensor, Tensor, Tensor]:
        grid = cells.shapes.shape[1:3]
        shapes, colors, boxes = (part.to(self.device) for part in cell_targets(data, batch.indices.tolist(), grid))
        answering, near = (shapes > 0).sum(), colors >= 0
        shape = F.cross_entropy(cells.shapes.flatten(0, 2), shapes.flatten(), ignore_index=-1, reduction="sum")
        stride = data.image_size / grid[1]
        return (
            shape / answering,
            F.cross_entropy(cells.colors[near], colors[near]),
            F.smooth_l1_loss(cells.boxes[near] / stride, boxes[near] / stride, beta=0.25),
        )


def cell_targets(data: CaptionedShapes, indices: list[int], grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What the cells should say of scenes.

    Returns int64 (B,h,w) of shapes, 1 for the first, 0 for none, -1 for cells that may say either; int64 (B,h,w) of
    colours, -1 where there is none; boxes in pixels (B,h,w,4).
    """
    size = data.image_size
    stride = size // grid[1]
    shapes, colors = torch.zeros(len(indices), *grid, dtype=torch.int64), torch.full((len(indices), *grid), -1)
    boxes = torch.zeros(len(indices), *grid, 4)
    x, y = cell_centres(grid, stride)
    for i, index in enumerate(indices):
        for thing in data.scene(index).things:
            box = box_of(thing, size)
            far = torch.maximum((x - (box[0] + box[2]) / 2).abs(), (y - (box[1] + box[3]) / 2).abs()) / stride
            near = far <= 1
            shapes[i][near] = -1
            shapes[i][far <= _ANSWERS] = 1 + SHAPES.index(thing.shape)
            colors[i][near] = _COLORS.index(thing.color)
            boxes[i][near] = torch.tensor(box)
    return shapes, colors, boxes


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> ShapesDetection:
    settings = recipe.method
    assert isinstance(settings, Settings)
    train = open_split(recipe.data, recipe.data.split)
    held_out = open_split(recipe.data, recipe.validation.split) if recipe.validation else None
    assert isinstance(train, CaptionedShapes)
    assert held_out is None or isinstance(held_out, CaptionedShapes)
    network = SmallConvNet(settings.channels, DETECTOR_OUTPUTS).to(device)
    return ShapesDetection(network, train, held_out, precision=recipe.training.precision, device=device)
