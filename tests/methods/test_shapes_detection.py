"""Training of the detector of shapes: what each cell should say, by hand, and a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_runs import crash, numbers, quiet, same, weights

from varpi.data import Batch
from varpi.data.scenes import SHAPE_COLORS, SHAPES
from varpi.data.shapes import CaptionedShapes
from varpi.errors import VarpiError
from varpi.methods import build_method
from varpi.methods.detector import cell_targets
from varpi.networks.convnet import load_classifier
from varpi.networks.shapes_detector import DETECTOR_OUTPUTS, Cells
from varpi.recipe import Recipe, parse_recipe


def detector_recipe(**training: Any) -> Recipe:
    return parse_recipe(
        {
            "method": {"name": "detector", "channels": [8, 8, 8]},
            "data": {"source": "shapes", "image_size": 32},
            "optimizer": {"learning_rate": 1e-2},
            "training": {"steps": 6, "batch_size": 8, "save_every": 2, **training},
            "validation": {"every": 3, "images": 16},
        }
    )


def batch_of(data: CaptionedShapes, indices: Sequence[int]) -> Batch:
    images = torch.stack([data[i].image for i in indices])
    places = torch.tensor(indices)
    return Batch(images, [data.caption(i) for i in indices], places, places, bad=0)


def test_the_cells_of_a_scene_by_hand() -> None:
    data = CaptionedShapes(split="test")
    indices = list(range(40))
    shapes, colors, boxes = cell_targets(data, indices, (8, 8))
    for i in indices:
        spoken = torch.zeros(8, 8, dtype=torch.bool)
        for name, several in data.exact_detections(i)[0].items():
            for number, box in enumerate(several):
                x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                column, row = int(x // 4), int(y // 4)
                assert shapes[i, row, column] == 1 + SHAPES.index(name)
                color = data.exact_detections(i)[1][name][number]
                assert colors[i, row, column] == list(SHAPE_COLORS).index(color)
                assert boxes[i, row, column].tolist() == pytest.approx(box[:4], abs=1e-4)
                centres = (torch.arange(8) + 0.5) * 4
                spoken |= ((centres - y).abs() <= 4)[:, None] & ((centres - x).abs() <= 4)[None]
        assert torch.equal(colors[i] >= 0, spoken)
        assert (shapes[i][~spoken] == 0).all()
        assert (shapes[i][spoken] != 0).all(), "beside a shape's cell nothing is told"
        assert (shapes[i] > 0).sum() >= len(data.scene(i).things)


def test_the_loss_by_hand() -> None:
    method: Any = build_method(detector_recipe(), None, "cpu")
    batch = batch_of(method.train, range(8))
    shapes, colors, boxes = cell_targets(method.train, list(range(8)), (8, 8))
    near = colors >= 0
    perfect = Cells(
        30 * F.one_hot(shapes.clamp(min=0), 1 + len(SHAPES)).float(),
        30 * F.one_hot(colors.clamp(min=0), len(SHAPE_COLORS)).float(),
        boxes,
    )
    assert [float(part) for part in method._losses(perfect, batch, method.train)] == pytest.approx([0, 0, 0], abs=1e-4)
    equal = Cells(torch.zeros(8, 8, 8, 7), torch.zeros(8, 8, 8, 9), boxes + 4)
    shape, color, box = method._losses(equal, batch, method.train)
    decided, answering = int((shapes >= 0).sum()), int((shapes > 0).sum())
    assert shape == pytest.approx(decided / answering * torch.tensor(7.0).log().item(), rel=1e-5)
    assert color == pytest.approx(torch.tensor(9.0).log().item(), rel=1e-5)
    assert box == pytest.approx(1 - 0.125, rel=1e-5)  # one stride off, and half of beta
    assert near.sum() > answering
    outcome = method.loss(batch, 0)
    parts = [float(part) for part in outcome.metrics.values()]
    assert outcome.loss.item() == pytest.approx(sum(parts), rel=1e-6)


def test_a_run_learns_resumes_and_is_judged_by_its_own_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = detector_recipe(micro_batch=4)
    whole = quiet(recipe, tmp_path / "whole")
    losses = [row["validation_loss"] for row in numbers(whole) if "validation_loss" in row]
    assert losses[1] < 0.95 * losses[0]
    network = load_classifier(whole / "model.safetensors")
    assert network.num_classes == DETECTOR_OUTPUTS
    crash(monkeypatch, recipe, tmp_path / "run", 3)
    assert same(weights(quiet(recipe, tmp_path / "run", resume=True)), weights(whole))

    method: Any = build_method(recipe, None, "cpu")
    method.model = network
    scenes = CaptionedShapes(split="validation")
    spread = [i * len(scenes) // 16 for i in range(16)]
    by_hand = [method.validation_loss(batch_of(scenes, spread[first : first + 4])).item() for first in range(0, 16, 4)]
    assert sum(by_hand) / 4 == pytest.approx(losses[1], rel=1e-5)


def test_other_data_is_refused() -> None:
    with pytest.raises(VarpiError, match=r"data\.source is digits; method detector learns from scenes it knows"):
        parse_recipe({**detector_recipe().model_dump(), "data": {"source": "digits", "image_size": 32}})
