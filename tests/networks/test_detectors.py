"""GenEval's detector and colorist at toy size."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from varpi.data.prompts import GENEVAL_COLORS
from varpi.errors import VarpiError
from varpi.evaluation.geneval import evaluate_geneval, write_geneval_folder
from varpi.networks.clip import ClipColorist, crop_object
from varpi.networks.mask2former import OBJECT_NAMES, Mask2FormerDetector

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "quick_gelu": True,
}
SMALL = (64, 192)
LABELS = {54: "doughnut", 57: "sofa", 60: "diningtable", 62: "tvmonitor", 64: "mouse", 65: "remote", 66: "keyboard"}


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask2former(folder: Path, labels: int = 80, names: dict[int, str] | None = None) -> Path:
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 1, 1],
            window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        num_queries=10,
        num_labels=labels,
    )
    config.id2label |= names or {}
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():  # large ones, so that queries differ in class and mask
        if parameter.ndim > 1:
            parameter.data.normal_(0, 3 if "queries" in name else 0.3, generator=generator)
    model.save_pretrained(folder)
    # As the Hub's older files have it, of another size than the detector shall use
    processor = {"image_processor_type": "Mask2FormerImageProcessor", "size": {"height": 32, "width": 32}}
    processor |= {"_max_size": 32, "reduce_labels": False, "num_labels": 80, "ignore_index": 255, "size_divisor": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def detector_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    coco = dict(enumerate(name.split()[-1] if "computer" in name else name for name in OBJECT_NAMES))
    return mask2former(tmp_path_factory.mktemp("mask2former"), names=coco | LABELS)


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.manual_seed(1)
    model = open_clip.CLIP(**CLIP)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.5)  # so that images differ
    torch.save({"state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)


# -- objects


def test_object_names_are_those_of_geneval() -> None:
    assert (len(OBJECT_NAMES), OBJECT_NAMES[0], OBJECT_NAMES[79]) == (80, "person", "toothbrush")
    digest = hashlib.sha256("\n".join(OBJECT_NAMES).encode()).hexdigest()
    assert digest == "8aad18a0fdff92ac691f5387a560abfee0c4027fd731fb8bbf83d5df11233cf5"  # of its object_names.txt


def test_detections_have_the_form_that_geneval_reads(detector_files: Path) -> None:
    detector = Mask2FormerDetector(detector_files, floor=0.05, size=SMALL)
    boxes, masks = detector(picture())
    assert boxes.keys() == masks.keys()
    assert len(boxes) >= 2
    assert set(boxes) <= set(OBJECT_NAMES)
    for name, found in boxes.items():
        assert masks[name].shape == (len(found), 40, 60)
        assert masks[name].dtype == bool
        for (left, upper, right, lower, score), mask in zip(found, masks[name], strict=True):
            assert 0.05 < score <= 1
            rows, columns = mask.nonzero()
            assert (left, right) == (columns.min(), columns.max() + 1)
            assert (upper, lower) == (rows.min(), rows.max() + 1)
    again, _ = detector(picture())
    assert again == boxes
    high, _ = Mask2FormerDetector(detector_files, floor=0.3, size=SMALL)(picture())
    kept = {name: [box for box in found if box[4] > 0.3] for name, found in boxes.items()}
    assert high == {name: found for name, found in kept.items() if found}
    assert Mask2FormerDetector(detector_files, floor=1.0, size=SMALL)(picture()) == ({}, {})


def test_detections_are_those_of_transformers_own_post_processing(tmp_path: Path) -> None:
    """At 384 pixels, where its own does not resize masks by the nearest neighbour."""
    folder = mask2former(tmp_path)
    image = picture(384, 384)
    boxes, masks = Mask2FormerDetector(folder, floor=0.0, size=(384, 384))(image)
    processor = transformers.Mask2FormerImageProcessor(size={"height": 384, "width": 384})
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**processor(images=image, return_tensors="pt"))
    [theirs] = processor.post_process_instance_segmentation(
        outputs, threshold=0.0, target_sizes=[(384, 384)], return_binary_maps=True
    )
    expected = {
        (OBJECT_NAMES[segment["label_id"]], int(mask.sum()), round(segment["score"], 4))
        for segment, mask in zip(theirs["segments_info"], theirs["segmentation"], strict=True)
    }
    assert len(expected) == 10
    assert expected == {
        (name, int(mask.sum()), round(box[4], 4))
        for name, found in boxes.items()
        for box, mask in zip(found, masks[name], strict=True)
    }


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (133, {}, "knows 133 classes; GenEval's detector must know COCO's 80"),
        (80, {2: "Boat", 8: "car"}, "class 2 is 'Boat', COCO's is 'car'; the order differs"),
    ],
)
def test_detector_of_other_classes(labels: int, names: dict[int, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=message):
        Mask2FormerDetector(mask2former(tmp_path, labels, names))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'),
            "of type 'clip'; expected 'mask2f",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "weights cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no checkpoint"),
    ],
)
def test_damaged_detector(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    spoil(mask2former(tmp_path))
    with pytest.raises(VarpiError, match=message):
        Mask2FormerDetector(tmp_path)


def test_detector_without_a_weight(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(mask2former(tmp_path) / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "class_predictor.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(VarpiError, match=r"1 weights are missing \(class_predictor.bias\)"):
        Mask2FormerDetector(tmp_path)


@pytest.mark.usefixtures("offline")
def test_weights_that_are_nowhere() -> None:
    with pytest.raises(
        VarpiError, match=r"GenEval's detector: facebook/mask2former-swin-small-coco-instance: .*pass the"
    ):
        Mask2FormerDetector()
    with pytest.raises(VarpiError, match=r"GenEval's colours: timm/vit_large_patch14_clip_224.openai: .*pass the"):
        ClipColorist()


@pytest.mark.parametrize(("package", "extra"), [("transformers", "evaluation,text"), ("open_clip", "evaluation")])
def test_missing_packages(package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(VarpiError, match=rf"needs {package}: pip install 'varpi\[{extra}\]'"):
        (Mask2FormerDetector if package == "transformers" else ClipColorist)(tmp_path)


# -- colours


def test_an_object_alone() -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    mask = np.zeros((4, 5), dtype=bool)
    mask[1, 1:3] = mask[2, 2] = True
    crop = np.asarray(crop_object(Image.fromarray(pixels), [1.0, 1.0, 3.0, 3.0, 0.9], mask))
    grey = [0x99, 0x99, 0x99]
    assert crop.tolist() == [[pixels[1, 1].tolist(), pixels[1, 2].tolist()], [grey, pixels[2, 2].tolist()]]


def test_colours_are_open_clips_zero_shot_choice(clip_file: Path) -> None:
    image = picture(20, 1).resize((60, 40), Image.Resampling.NEAREST)  # stripes
    masks = np.random.default_rng(5).random((20, 40, 60)) < np.linspace(0.3, 1, 20)[:, None, None]
    boxes = [[3.0 * (i // 2), 3.0, 3.0 * (i + 1), 33.0 - i, 0.9] for i in range(20)]
    colorist = ClipColorist(clip_file, architecture=CLIP)
    colors = colorist(image, "hot dog", boxes, masks)

    model = open_clip.CLIP(**CLIP).eval()
    model.load_state_dict(torch.load(clip_file)["state_dict"])
    templates = ["a photo of a {} hot dog", "a photo of a {}-colored hot dog", "a photo of a {} object"]
    tokenizer = open_clip.SimpleTokenizer(context_length=20)
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, GENEVAL_COLORS, templates)
    crops = []
    for (left, upper, right, lower, _), mask in zip(boxes, masks, strict=True):
        pixels = np.where(mask[..., None], np.asarray(image), np.uint8(0x99))
        crops.append(Image.fromarray(pixels[int(upper) : int(lower), int(left) : int(right)]))
    transform = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        features = model.encode_image(torch.stack([transform(crop) for crop in crops]), normalize=True)
        expected = (features @ classifier).argmax(dim=1)
    assert colors == [GENEVAL_COLORS[i] for i in expected]
    assert len(set(colors)) > 1
    assert colorist(image, "hot dog", [], np.zeros((0, 40, 60), dtype=bool)) == []


def test_clip_that_does_not_fit(clip_file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        VarpiError, match=r"colours: .*clip.pt: does not fit a configuration of open_clip: .*wrong shape"
    ):
        ClipColorist(clip_file, architecture=CLIP | {"embed_dim": 8})
    with pytest.raises(VarpiError, match="open_clip knows no architecture 'ViT-L-15'"):
        ClipColorist(clip_file, architecture="ViT-L-15")
    tensors = torch.load(clip_file)["state_dict"]
    del tensors["ln_final.bias"]
    torch.save(tensors, tmp_path / "less.pt")
    with pytest.raises(VarpiError, match=r"1 missing: ln_final.bias"):
        ClipColorist(tmp_path / "less.pt", architecture=CLIP)


def test_the_two_networks_judge_a_folder(detector_files: Path, clip_file: Path, tmp_path: Path) -> None:
    detector = Mask2FormerDetector(detector_files, size=SMALL)
    colorist = ClipColorist(clip_file, architecture=CLIP)
    image = picture()
    boxes, masks = detector(image)
    name = max(boxes, key=lambda name: max(box[4] for box in boxes[name]))
    best = int(np.argmax([box[4] for box in boxes[name]]))
    assert boxes[name][best][4] > 0.3
    color = colorist(image, name, boxes[name], masks[name])[best]
    absent = next(other for other in OBJECT_NAMES if other not in boxes)
    asked = [
        {"class": name, "count": 1, "color": color},
        {"class": name, "count": 1, "color": next(other for other in GENEVAL_COLORS if other != color)},
        {"class": absent, "count": 1},
    ]
    metadata = [{"tag": f"task {i}", "include": [one], "prompt": f"prompt {i}"} for i, one in enumerate(asked)]
    write_geneval_folder(tmp_path, metadata, [np.asarray(image)[None]] * 3)
    result = evaluate_geneval(tmp_path, detector=detector, colorist=colorist)
    assert result.metrics == {"overall": 1 / 3, "task 0": 1.0, "task 1": 0.0, "task 2": 0.0}
    assert result.details["prompts"][2]["reasons"] == {"0000.png": f"expected {absent}>=1, found 0"}
    assert result.evaluator["name"] == "GenEval (HF Mask2Former)"
    weights = hashlib.sha256((detector_files / "model.safetensors").read_bytes()).hexdigest()
    identity = {"model": "mask2former", "sha256": weights, "size": [64, 192], "floor": 0.1}
    assert result.evaluator["detector"] == identity
