"""The captioned shapes: drawn by split and index alone, boxes on their pixels, captions that say what is there."""

import hashlib
import importlib.resources
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from varpi.data import open_dataset
from varpi.data.captions import clean_caption
from varpi.data.prompts import GENEVAL_TASKS, read_geneval_metadata
from varpi.data.rendering import box_of, render_scene
from varpi.data.scenes import HELD_OUT_PAIRS, SCENES, SHAPE_COLORS, SHAPES, draw_scene, plural
from varpi.data.shapes import CaptionedShapes
from varpi.data.text_encoder import TextEncoder
from varpi.errors import VarpiError
from varpi.evaluation.geneval import judge_geneval
from varpi.runtime.files import write_text


def test_a_scene_depends_on_split_and_index_alone() -> None:
    first, again = (CaptionedShapes(split="test") for _ in range(2))
    order = [7, 3, 3, 5999, 0]
    images = {index: first[index].image for index in sorted(set(order))}
    for index in order:
        image, caption = again[index]
        assert torch.equal(image, images[index])
        assert caption == first.caption(index)
    every = [open_dataset("shapes", image_size=32, split=split)[12].image for split in SCENES]
    assert len({image.numpy().tobytes() for image in every}) == len(SCENES)
    assert len({open_dataset("shapes", image_size=32, split=split).fingerprint for split in SCENES}) == len(SCENES)


def test_the_scenes_never_change() -> None:
    """Weights and results belong to these pixels: whoever changes them gives the data another version."""
    shapes = CaptionedShapes()
    assert [shapes.caption(index) for index in (0, 1, 2, 3, 4, 5, 2**20 - 1)] == [
        "a photo of a circle",
        "a photo of a cross and a circle",
        "a photo of three circles",
        "a photo of an orange star",
        "a photo of a triangle right of a square",
        "a photo of a black cross and a red triangle",
        "a photo of a white circle",
    ]
    means = [shapes[index].image.mean().item() for index in range(6)]
    assert means == pytest.approx([0.1235, 0.0754, -0.1299, -0.022, 0.1642, 0.1546], abs=2e-4)
    assert shapes.fingerprint == hashlib.sha256(b"shapes 1 train 1048576 32").hexdigest()


def test_images() -> None:
    small, large = CaptionedShapes(split="test"), CaptionedShapes(split="test", image_size=64)
    for index in range(30):
        image = small[index].image
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert -1 <= image.min() < image.max() <= 1
        halved = torch.nn.functional.avg_pool2d(large[index].image, 2)
        assert (halved - image).abs().mean() < 0.03, "the same scene in finer pixels"
        assert large.caption(index) == small.caption(index)


@pytest.mark.parametrize("size", [32, 64])
def test_boxes_are_those_of_the_pixels(size: int) -> None:
    for split, index in [(split, index) for split in SCENES for index in range(60)]:
        scene = draw_scene(split, index)
        empty = render_scene(replace(scene, things=()), size).astype(int)
        for thing in scene.things:
            lone = np.abs(render_scene(replace(scene, things=(thing,)), size) - empty).max(axis=2) > 25
            rows, columns = (np.flatnonzero(lone.any(axis=axis)) for axis in (1, 0))
            seen = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            box = box_of(thing, size)
            assert 0 < min(box) < max(box) < size
            # Tips of stars and triangles are thinner than a pixel, and blended corners reach over by less than one
            inwards = np.subtract(seen, box) * (1, 1, -1, -1)
            assert -1.5 < inwards.min() <= inwards.max() < 3, (split, index, thing.shape)


def test_things_do_not_touch() -> None:
    for index in range(1000):
        boxes = [box_of(thing, 32) for thing in draw_scene("train", index).things]
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) > 1.5


def test_held_out_pairs_are_in_their_split_alone() -> None:
    assert {color for _, color in HELD_OUT_PAIRS} == set(SHAPE_COLORS)
    assert {shape for shape, _ in HELD_OUT_PAIRS} == set(SHAPES)
    trained = {(thing.shape, thing.color) for index in range(20_000) for thing in draw_scene("train", index).things}
    assert not trained & HELD_OUT_PAIRS
    assert len(trained) == len(SHAPES) * len(SHAPE_COLORS) - len(HELD_OUT_PAIRS)
    for split in ("validation", "test"):
        found = {(thing.shape, thing.color) for i in range(SCENES[split]) for thing in draw_scene(split, i).things}
        assert not found & HELD_OUT_PAIRS
    found = {(thing.shape, thing.color) for index in range(3000) for thing in draw_scene("every", index).things}
    assert len(found) == len(SHAPES) * len(SHAPE_COLORS)
    held_out = CaptionedShapes(split="held_out")
    seen = set()
    for index in range(len(held_out)):
        metadata = held_out.geneval_metadata(index)
        asked = {(wanted["class"], wanted["color"]) for wanted in metadata["include"]}
        assert asked <= HELD_OUT_PAIRS
        assert asked == {(thing.shape, thing.color) for thing in held_out.scene(index).things}
        seen |= asked
    assert seen == HELD_OUT_PAIRS


@pytest.mark.parametrize("split", SCENES)
def test_every_real_scene_is_judged_right(split: str) -> None:
    shapes = CaptionedShapes(split=split)
    tasks = ("colors", "color_attr") if split == "held_out" else GENEVAL_TASKS
    for index in range(1200):
        metadata = shapes.geneval_metadata(index)
        assert metadata["tag"] == tasks[index % len(tasks)]
        detections, colors = shapes.exact_detections(index)
        assert judge_geneval(detections, metadata, colors) == (True, ""), (index, metadata)


def test_another_scene_is_seldom_right() -> None:
    """The judge can fail: by the detections of the next scene of the same task."""
    shapes = CaptionedShapes(split="test")
    right = dict.fromkeys(GENEVAL_TASKS, 0)
    for index in range(1200):
        detections, colors = shapes.exact_detections(index + 6)
        metadata = shapes.geneval_metadata(index)
        right[metadata["tag"]] += judge_geneval(detections, metadata, colors)[0]
    assert right["single_object"] < 60  # of 200, by chance 33
    assert right["two_object"] < 40
    assert right["counting"] < 40
    assert right["colors"] < 20
    assert right["position"] < 20
    assert right["color_attr"] < 10


def test_captions_say_what_the_metadata_ask(tmp_path: Path) -> None:
    numbers = {1: "a", 2: "two", 3: "three", 4: "four"}
    records = []
    for index in range(1200):
        shapes = CaptionedShapes(split="test")
        metadata = shapes.geneval_metadata(index)
        records.append(metadata)
        caption = shapes.caption(index)
        assert metadata["prompt"] == caption
        assert clean_caption(clean_caption(caption)) == caption, "what the text encoder reads"
        parts = []
        for wanted in metadata["include"]:
            name = wanted["class"] if wanted["count"] == 1 else plural(wanted["class"])
            named = f"{wanted['color']} {name}" if "color" in wanted else name
            article = "an" if named.startswith("orange") else numbers[wanted["count"]]
            parts.append(f"{article} {named}")
        relation = metadata["include"][-1].get("position", ["and"])[0]
        if metadata["tag"] == "position":
            parts.reverse()
        assert caption == "a photo of " + f" {relation} ".join(parts)
    path = tmp_path / "metadata.jsonl"
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    assert read_geneval_metadata(path) == records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 48}, "shapes: image_size is 48; shapes are drawn at 32 or 64 pixels"),
        ({"image_size": 32, "split": "dev"}, "shapes: no split 'dev'; it has train, validation, test, held_out, every"),
        ({"image_size": 32, "caption_column": "text"}, "shapes: has captions of its own; leave out caption_column"),
        ({"image_size": 32, "min_side": 8}, "shapes: min_side is for captioned images of many sizes"),
    ],
)
def test_what_the_shapes_refuse(arguments: dict, message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        open_dataset("shapes", **arguments)


def test_the_text_encoder_tells_which_colour_belongs_to_which_shape() -> None:
    """The generator takes a sum over the words, so each word's features must tell its neighbours."""
    folder = Path(str(importlib.resources.files("varpi.embedded") / "shapes-text"))
    known = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    captions = [CaptionedShapes(split=split).caption(i) for split in SCENES for i in range(600)]
    assert {word for caption in captions for word in caption.split()} <= set(known)
    assert max(len(caption.split()) for caption in captions) + 1 <= 12, "the generator's condition_tokens"

    encoder = TextEncoder(folder, dtype=torch.float32)
    one, other = encoder(["a photo of a red circle and a blue square", "a photo of a blue circle and a red square"])
    assert one.shape == (11, 128)
    apart = (one - other).norm(dim=1) / one.norm(dim=1)
    assert apart[5] > 0.3, "circle, whose colour differs, though the words of the captions are the same"
    assert apart[9] > 0.3, "square"
    near, far = encoder(["a photo of a ring left of a star", "a photo of a star left of a ring"])
    assert ((near[4] - far[8]).norm() / near[4].norm()) > 0.3, "ring, on this side of the relation or on that"
