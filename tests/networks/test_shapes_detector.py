"""The detector of shapes: what it makes of cells by hand, and how often the embedded one is right about real scenes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from varpi.data.prompts import GENEVAL_TASKS
from varpi.data.rendering import render_scene
from varpi.data.scenes import SHAPE_COLORS
from varpi.data.shapes import CaptionedShapes
from varpi.errors import VarpiError
from varpi.evaluation.geneval import judge_geneval
from varpi.networks.convnet import SmallConvNet, save_classifier
from varpi.networks.shapes_detector import DETECTOR_OUTPUTS, Cells, ShapesColorist, ShapesDetector, read_cells


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    network = SmallConvNet((8, 8, 8), DETECTOR_OUTPUTS)
    save_classifier(network, tmp_path / "detector.safetensors", network.state_dict(), {})
    return tmp_path / "detector.safetensors"


def image(side: int = 32) -> Image.Image:
    return Image.fromarray(np.zeros((side, side, 3), dtype=np.uint8))


def test_the_head_is_read_at_every_cell() -> None:
    network = SmallConvNet((8, 8, 8), DETECTOR_OUTPUTS)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    cells = read_cells(network, images)
    assert [part.shape for part in cells] == [(2, 8, 8, 7), (2, 8, 8, 9), (2, 8, 8, 4)]
    outputs = network.head(network.maps(images)[-1][1, :, 2, 5])
    torch.testing.assert_close(cells.shapes[1, 2, 5], outputs[:7])
    torch.testing.assert_close(cells.colors[1, 2, 5], outputs[7:16])
    # Row 2 and column 5 have their centre at y = 10 and x = 22
    torch.testing.assert_close(cells.boxes[1, 2, 5], torch.tensor([22.0, 10, 22, 10]) + 4 * outputs[16:])


def test_of_boxes_that_overlap_the_best_is_kept(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, colors, boxes = torch.zeros(1, 8, 8, 7), torch.zeros(1, 8, 8, 9), torch.zeros(1, 8, 8, 4)
    shapes[..., 0] = 20
    for row, column, shape, color, strength, box in [
        (1, 1, 0, 2, 24, [0, 0, 10, 10]),  # a yellow circle
        (1, 2, 1, 3, 23, [0, 1, 10, 11]),  # over it
        (1, 6, 0, 4, 22, [20, 0, 30, 10]),  # another circle, blue
        (6, 6, 5, 8, 21, [25, 25, 40, 40]),  # a white ring that reaches over the edge
        (3, 3, 2, 1, 17, [10, 10, 20, 20]),  # too weak
        (5, 1, 3, 1, 24, [9, 20, 9, 28]),  # of no width
    ]:
        shapes[0, row, column, 1 + shape], colors[0, row, column, color] = strength, 5
        boxes[0, row, column] = torch.tensor(box)
    detector = ShapesDetector(weights)
    monkeypatch.setattr(ShapesDetector, "cells", lambda self, image: Cells(shapes, colors, boxes))
    found, masks = detector(image())
    likely = torch.tensor([24.0, 22, 21]).sub(20).sigmoid().tolist()  # against "nothing here"; the others are far below
    assert found.keys() == {"circle", "ring"}
    assert found["circle"][0] == pytest.approx([0, 0, 10, 10, likely[0]], abs=1e-4)
    assert found["circle"][1] == pytest.approx([20, 0, 30, 10, likely[1]], abs=1e-4)
    assert found["ring"] == [pytest.approx([25, 25, 32, 32, likely[2]], abs=1e-4)]
    assert masks["circle"].sum(axis=(1, 2)).tolist() == [100, 100]
    assert masks["ring"][0, 25:, 25:].all()
    assert masks["ring"].sum() == 49
    # The middle of the first lies in cell (1, 1), of the second in (1, 6), of the ring in (7, 7)
    colors[0, 7, 7, 6] = 9
    colorist = ShapesColorist(detector)
    assert colorist(image(), "circle", found["circle"], masks["circle"]) == ["yellow", "blue"]
    assert colorist(image(), "ring", found["ring"], masks["ring"]) == [list(SHAPE_COLORS)[6]]


def test_what_the_detector_refuses(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match="an image of 64x64 pixels; the detector of shapes knows 32x32"):
        ShapesDetector(weights)(image(64))
    network = SmallConvNet((8, 8, 8), 10)
    save_classifier(network, tmp_path / "other.safetensors", network.state_dict(), {})
    with pytest.raises(VarpiError, match=r"other\.safetensors: has 10 outputs; a detector of shapes has 20"):
        ShapesDetector(tmp_path / "other.safetensors")


def shares_right(split: str, count: int) -> dict[str, float]:
    """The share of real scenes, by task, that GenEval's rules find right by what the embedded detector sees."""
    data, detector = CaptionedShapes(split=split), ShapesDetector()
    colorist, right = ShapesColorist(detector), dict.fromkeys(GENEVAL_TASKS, 0)
    for index in range(count):
        pixels = Image.fromarray(render_scene(data.scene(index), 32))
        boxes, masks = detector(pixels)
        colors = {name: colorist(pixels, name, boxes[name], masks[name]) for name in boxes}
        metadata = data.geneval_metadata(index)
        right[metadata["tag"]] += judge_geneval(boxes, metadata, colors)[0]
    tasks = GENEVAL_TASKS if split != "held_out" else ("colors", "color_attr")
    return {task: right[task] * len(tasks) / count for task in tasks}


def test_the_embedded_detector_is_right_about_real_scenes() -> None:
    shares = shares_right("test", 240)
    assert min(shares.values()) >= 0.95, shares
    assert sum(shares.values()) / 6 >= 0.98, shares
    shares = shares_right("held_out", 80)
    assert min(shares.values()) >= 0.95, shares


def test_its_boxes_are_the_shapes() -> None:
    data, detector = CaptionedShapes(split="test"), ShapesDetector()
    errors = []
    for index in range(0, 240, 2):
        found, _ = detector(Image.fromarray(render_scene(data.scene(index), 32)))
        for name, boxes in data.exact_detections(index)[0].items():
            for box in boxes:
                nearest = min(found.get(name, [[0.0] * 5]), key=lambda one: np.abs(np.subtract(one, box)[:4]).max())
                errors.append(np.abs(np.subtract(nearest, box)[:4]).max())
    assert np.median(errors) < 0.7, "pixels"
