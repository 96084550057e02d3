"""CLIP and HPS scores at toy size against the networks themselves, and the evaluation of sets of images."""

import json
import math
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from varpi.errors import VarpiError
from varpi.evaluation.result import differences, read_result, write_result
from varpi.evaluation.text_scores import clip_scores, evaluate_text, hps_scores
from varpi.networks.hps import HpsScorer, fit_longer_side
from varpi.samples.images import save_npz, save_png

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

HPS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PROMPTS = ["a dog", "two cats", "a dog", "a red cow on grass", "two cats"]


def pictures(count: int = 5, height: int = 40, width: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def enlarge(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that scores differ."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.5, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes
        | {"vocab_size": 54, "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53},
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    enlarge(transformers.CLIPModel(config)).save_pretrained(folder)
    transformers.CLIPProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[]),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 3, "state_dict": enlarge(open_clip.CLIP(**HPS)).state_dict()}, path)
    return path


# -- CLIP


def test_clip_score_is_the_cosine_of_each_pair(clip: Path) -> None:
    scores = clip_scores(pictures(), PROMPTS, source=clip, batch_size=2)
    assert scores.shape == (5,)
    assert scores.dtype == np.float32
    assert scores.std() > 0.05
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    for picture, prompt, score in zip(pictures(), PROMPTS, scores, strict=True):
        inputs = processor(
            text=prompt, images=Image.fromarray(picture), truncation=True, max_length=12, return_tensors="pt"
        )
        with torch.no_grad():
            vision = model.vision_model(inputs["pixel_values"]).pooler_output
            text = model.text_model(inputs["input_ids"]).pooler_output
            cosine = torch.cosine_similarity(model.visual_projection(vision), model.text_projection(text))
        assert score == pytest.approx(cosine.item(), abs=1e-5)


def test_clip_reads_the_beginning_of_a_long_prompt(clip: Path) -> None:
    images = pictures(2)
    prompts = ["abcdefghij" + rest for rest in ("klm nop", "xyz")]  # a letter a token, 10 and two marks are read
    one, other = (clip_scores(images[:1], [prompt], source=clip) for prompt in prompts)
    assert one == other
    short = clip_scores(images[:1], ["abcdefghi"], source=clip)
    assert abs(short - one) > 1e-3


# -- HPS


def test_hps_is_the_cosine_of_each_pair(hps: Path) -> None:
    scores = hps_scores(pictures(), PROMPTS, weights=hps, architecture=HPS, batch_size=2)
    assert scores.dtype == np.float32
    assert scores.std() > 0.05
    model = open_clip.CLIP(**HPS, output_dict=True).eval()
    model.load_state_dict(torch.load(hps)["state_dict"])
    pixels = torch.from_numpy(pictures()).permute(0, 3, 1, 2) / 255
    pixels = torch.nn.functional.interpolate(pixels, (32, 32), mode="bicubic", antialias=True)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    with torch.no_grad():
        outputs = model((pixels - mean) / deviation, open_clip.SimpleTokenizer(context_length=20)(PROMPTS))
    expected = torch.diagonal(outputs["image_features"] @ outputs["text_features"].T)
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


def test_images_that_are_not_square_are_padded_with_black() -> None:
    wide = fit_longer_side(torch.ones(1, 3, 21, 64), 32)
    assert wide.shape == (1, 3, 32, 32)
    assert wide[0, 0, :, 0].round(decimals=5).tolist() == [0.0] * 11 + [1.0] * 10 + [0.0] * 11
    tall = fit_longer_side(torch.ones(1, 3, 32, 7), 32)
    assert tall.shape == (1, 3, 32, 32)
    assert tall[0, 0, 0].tolist() == [0.0] * 12 + [1.0] * 7 + [0.0] * 13
    square = torch.rand(1, 3, 32, 32)
    assert fit_longer_side(square, 32).equal(square)


def test_hps_versions(hps: Path, tmp_path: Path) -> None:
    tensors = torch.load(hps)["state_dict"]
    torch.save({"state_dict": tensors}, tmp_path / "mine.pt")
    assert HpsScorer(tmp_path / "mine.pt", version="v2.0", architecture=HPS).name == "hps_v2.0"
    assert HpsScorer(hps, architecture=HPS).name == "hps_v2.1"
    with pytest.raises(VarpiError, match=r"is HPS v2.1's file by its name, and v2.0 was asked for"):
        HpsScorer(hps, version="v2.0", architecture=HPS)
    with pytest.raises(VarpiError, match=r"there is no HPS 'v3'; there are v2.1, v2.0"):
        HpsScorer(hps, version="v3", architecture=HPS)


def test_hps_checkpoint_that_does_not_fit(hps: Path, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=r"HPS v2.1, file HPS_v2.1_compressed.pt of .*does not fit .*wrong shape"):
        hps_scores(pictures(), PROMPTS, weights=hps, architecture=HPS | {"embed_dim": 8})
    tensors = torch.load(hps)["state_dict"]
    torch.save({"state_dict": tensors | {"head.weight": torch.ones(2)}}, tmp_path / "more.pt")
    with pytest.raises(VarpiError, match=r"1 unexpected: head.weight"):
        hps_scores(pictures(), PROMPTS, weights=tmp_path / "more.pt", architecture=HPS)


# -- what both refuse


def test_weights_that_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(VarpiError, match=r"the CLIP score: openai/clip-vit-base-patch32: .*pass the directory"):
        clip_scores(pictures(), PROMPTS)
    with pytest.raises(
        VarpiError, match=r"HPS v2.0, file HPS_v2_compressed.pt of huggingface.co/xswu/HPSv2: .*pass the"
    ):
        hps_scores(pictures(), PROMPTS, version="v2.0")
    with pytest.raises(VarpiError, match=r"file HPS_v2.1_compressed.pt of .*absent.pt: no such file"):
        hps_scores(pictures(), PROMPTS, weights=tmp_path / "absent.pt")


@pytest.mark.parametrize(("package", "extra"), [("transformers", "evaluation,text"), ("open_clip", "evaluation")])
def test_missing_packages(package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(VarpiError, match=rf"needs {package}: pip install 'varpi\[{extra}\]'"):
        (clip_scores if package == "transformers" else hps_scores)(pictures(), PROMPTS)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tokenizer.json", "holds no tokenizer"),
        ("processor_config.json", "its processor and tokenizer cannot be loaded"),
    ],
)
def test_incomplete_clip(missing: str, message: str, clip: Path, tmp_path: Path) -> None:
    for name in {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} - {missing}:
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    with pytest.raises(VarpiError, match=message):
        clip_scores(pictures(), PROMPTS, source=tmp_path)


def test_arguments_that_do_not_fit(clip: Path) -> None:
    with pytest.raises(VarpiError, match="5 images and 4 prompts; give one prompt for each image"):
        clip_scores(pictures(), PROMPTS[:4], source=clip)
    with pytest.raises(VarpiError, match="1 images and 1 prompts"):
        clip_scores(pictures(1), "a", source=clip)
    with pytest.raises(VarpiError, match="0 images and 0 prompts"):
        clip_scores(pictures(0), [], source=clip)
    with pytest.raises(VarpiError, match=r"expected images uint8 of shape \(N, H, W, 3\), got float64"):
        clip_scores(pictures().astype(float), PROMPTS, source=clip)
    with pytest.raises(VarpiError, match="batch_size is 0"):
        clip_scores(pictures(), PROMPTS, source=clip, batch_size=0)


# -- sets


def sampled(folder: Path, record: dict[str, Any]) -> Path:
    """A directory of `varpi sample`."""
    for i, image in enumerate(pictures()):
        save_png(folder / f"{i:05d}.png", image)
    save_npz(folder / "samples.npz", pictures())
    (folder / "sample.json").write_text(json.dumps(record))
    return folder


def in_geneval_layout(folder: Path, records: list[dict[str, Any]], pictures: np.ndarray) -> Path:
    for i, record in enumerate(records):
        for j in range(2):
            save_png(folder / f"{i:05d}" / "samples" / f"{j:04d}.png", pictures[2 * i + j])
        (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(record))
        save_png(folder / f"{i:05d}" / "grid.png", pictures[0])
    return folder


def test_a_directory_of_samples(clip: Path, hps: Path, tmp_path: Path) -> None:
    folder = sampled(tmp_path / "images", {"seed": 1, "guidance_scale": 7.5, "prompts": PROMPTS})
    result = evaluate_text(folder, clip_source=clip, hps_weights=hps, hps_architecture=HPS, batch_size=2)
    expected = {
        "clip_score": clip_scores(pictures(), PROMPTS, source=clip).astype(float),
        "hps_v2.1": hps_scores(pictures(), PROMPTS, weights=hps, architecture=HPS).astype(float),
    }
    assert set(result.metrics) == {*expected, *(f"{name}_standard_error" for name in expected)}
    for name, scores in expected.items():
        assert result.metrics[name] == pytest.approx(scores.mean(), abs=1e-6)
        error = scores.std(ddof=1) / math.sqrt(5)
        assert result.metrics[f"{name}_standard_error"] == pytest.approx(error, abs=1e-6)
        assert result.details["images"][name] == pytest.approx(scores.tolist(), abs=1e-6)
    prompts = result.details["prompts"]
    assert [(one["prompt"], one["images"]) for one in prompts] == [
        ("a dog", 2),
        ("two cats", 2),
        ("a red cow on grass", 1),
    ]
    assert prompts[1]["hps_v2.1"] == pytest.approx(expected["hps_v2.1"][[1, 4]].mean(), abs=1e-6)
    assert result.sampling == {"seed": 1, "guidance_scale": 7.5}
    assert result.samples["count"] == 5
    assert result.samples["image_size"] == [40, 40]
    assert result.reference is not None
    assert result.reference["count"] == 3
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json").metrics == result.metrics


def test_a_folder_in_genevals_layout(clip: Path, tmp_path: Path) -> None:
    records = [{"tag": "x", "prompt": "a dog"}, {"conversations": [{"from": "human", "value": "two cats"}]}]
    folder = in_geneval_layout(tmp_path / "out", records, pictures())
    result = evaluate_text(folder, metrics=["clip"], clip_source=clip)
    expected = clip_scores(pictures(4), ["a dog", "a dog", "two cats", "two cats"], source=clip)
    assert result.details["images"]["clip_score"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert result.sampling is None
    save_png(folder / "extra.png", pictures()[0])
    with pytest.raises(VarpiError, match=r"extra.png: lies in no prompt folder"):
        evaluate_text(folder, metrics=["clip"], clip_source=clip)
    (folder / "00001" / "metadata.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(VarpiError, match=r"00001.metadata.jsonl: holds 2 prompts; a folder has one"):
        evaluate_text(folder, metrics=["clip"], clip_source=clip)


def test_given_prompts(clip: Path, tmp_path: Path) -> None:
    save_npz(tmp_path / "samples.npz", pictures())
    result = evaluate_text(tmp_path / "samples.npz", PROMPTS, metrics=["clip"], clip_source=clip)
    folder = sampled(tmp_path / "images", {"prompts": PROMPTS})
    same = evaluate_text(folder, metrics=["clip"], clip_source=clip)
    assert same.metrics == result.metrics
    assert same.samples["sha256"] == result.samples["sha256"]
    assert differences({"one": result, "other": same}) == []
    other = evaluate_text(folder, PROMPTS[::-1], metrics=["clip"], clip_source=clip)
    assert other.metrics != result.metrics
    with pytest.raises(VarpiError, match="another reference"):
        differences({"one": result, "other": other})


def test_one_image_has_no_standard_error(clip: Path, tmp_path: Path) -> None:
    save_npz(tmp_path / "samples.npz", pictures(1))
    result = evaluate_text(tmp_path / "samples.npz", ["a dog"], metrics=["clip"], clip_source=clip)
    assert list(result.metrics) == ["clip_score"]


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda at: sampled(at, {"classes": [1] * 5}), {}, "sample.json names classes, not prompts; give the prompts"),
        (lambda at: sampled(at, {"prompts": ["a"] * 4}), {}, "lists 4 prompts, and there are 5 images"),
        (lambda at: sampled(at, {"seed": 1}), {}, "nothing there says of what prompts; give the prompts, one for each"),
        (lambda at: sampled(at, {}), {"prompts": ["a"] * 3}, "5 images and 3 prompts"),
        (
            lambda at: sampled(at, {"prompts": PROMPTS}),
            {"metrics": ["fid"]},
            "no text metric 'fid'; there are clip, hps",
        ),
        (lambda at: sampled(at, {"prompts": PROMPTS}), {"metrics": []}, "no text metric was asked for"),
        (lambda at: sampled(at, {"prompts": PROMPTS}), {"batch_size": 0}, "batch_size is 0"),
        (lambda at: at, {}, "no such file or directory"),
    ],
)
def test_sets_that_are_refused(
    make: Callable[[Path], Path], options: dict[str, Any], message: str, clip: Path, tmp_path: Path
) -> None:
    with pytest.raises(VarpiError, match=message):
        evaluate_text(make(tmp_path / "set"), **{"metrics": ["clip"], "clip_source": clip} | options)
