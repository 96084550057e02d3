"""Shapes from captions to GenEval's scores, through the command line, by a random pair and a random detector."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml
from training_runs import contents

from varpi.cli.main import main
from varpi.data.prompts import GENEVAL_TASKS
from varpi.data.shapes import CaptionedShapes
from varpi.evaluation.result import read_result
from varpi.networks import shapes_detector
from varpi.networks.convnet import SmallConvNet, save_classifier
from varpi.weights import save_generator, save_tokenizer

GENERATOR = replace(tiny.GENERATOR, grid=8, conditioning="text", condition_tokens=12, caption_dim=128)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    save_generator(tiny.generator(GENERATOR), folder / "generator.safetensors")
    save_tokenizer(tiny.tokenizer(), folder / "tokenizer.safetensors")
    recipe = {
        "method": {"name": "va_pi", "group_size": 2, "reward": {"perceptual_weight": 0}},
        "generator": {"source": str(folder / "generator.safetensors"), "text_encoder": "shapes"},
        "tokenizer": {"source": str(folder / "tokenizer.safetensors")},
        "data": {"source": "shapes", "image_size": 32},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 1, "batch_size": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "recipe.yaml"), "--output", str(folder / "run"), "--device", "cpu"]) == 0
    return folder / "run"


def test_a_run_is_judged(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = SmallConvNet((8, 8, 8), shapes_detector.DETECTOR_OUTPUTS)
    save_classifier(network, tmp_path / "detector.safetensors", network.state_dict(), {})
    monkeypatch.setattr(shapes_detector, "embedded", lambda *_: tmp_path / "detector.safetensors")
    asked = ["--captions", "shapes", "--limit", "6", "--per-prompt", "2", "--kind", "geneval", "--detector", "shapes"]
    assert main(["evaluate", str(run), *asked, "--seed", "1", "--json", str(tmp_path / "one.json")]) == 0
    result = read_result(tmp_path / "one.json")
    assert list(result.metrics) == ["overall", *GENEVAL_TASKS]
    assert result.evaluator["name"] == "GenEval (shapes detector)"
    assert result.samples["count"] == 12
    assert result.samples["images_per_prompt"] == 2
    data = CaptionedShapes(split="test")
    assert [one["prompt"] for one in result.details["prompts"]] == [data.caption(i) for i in range(6)]
    (folder,) = (run / "samples").iterdir()
    written = json.loads((folder / "geneval" / "00004" / "metadata.jsonl").read_text())
    assert written == data.geneval_metadata(4)

    assert (
        main(["evaluate", str(run), *asked, "--caption-split", "held_out", "--json", str(tmp_path / "two.json")]) == 0
    )
    assert list(read_result(tmp_path / "two.json").metrics) == ["overall", "colors", "color_attr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a ring"], "--geneval: give GenEval's metadata by --prompts, or --captions shapes"),
        (["--captions", "captioned-digits"], "--geneval: give GenEval's metadata by --prompts, or --captions shapes"),
        (["--captions", "shapes", "--colorist", "x"], "--colorist: the detector of shapes names their colours itself"),
        (["--captions", "shapes", "--metadata", "gone.jsonl"], "gone.jsonl: cannot be read as"),
        (["--captions", "shapes", "--detections", "gone.json"], "gone.json: cannot be read as a JSON file"),
        (["--captions", "shapes", "--detections", "x", "--cache", "y"], "leave them out with --detections"),
    ],
)
def test_what_is_refused(run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    before = contents(run)
    assert main(["evaluate", str(run), "--kind", "geneval", "--detector", "shapes", "--limit", "3", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert contents(run) == before  # refused before anything is sampled
