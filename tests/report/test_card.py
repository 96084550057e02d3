"""A run as others get it: what its card says, that its files load by what the card names, and what goes to the Hub."""

import re
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import tiny
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from training_runs import contents, quiet, same

from varpi.cli.main import main
from varpi.evaluation import Result, write_result
from varpi.generators.llamagen_files import SIZES
from varpi.report.card import export_with_card
from varpi.runtime.tensors import sha256_of
from varpi.weights import load_generator, load_tokenizer, to_original


@pytest.fixture
def run(pair: Path, tmp_path: Path) -> Path:
    return quiet(tiny.recipe(pair, "training.steps=2"), tmp_path / "run")


def result(path: Path, digest: str | None, **metrics: float) -> None:
    sampling = {"guidance_scale": 1.5, "seed": 7, "generator_sha256": digest}
    reference = {"source": "cifar10[test]", "sha256": "1", "count": 800}
    evaluator = {"extractor": {"name": "dinov2", "sha256": "2"}, "neighbors": 3}
    write_result(path, Result("distribution", metrics, {"count": 90}, sampling, reference, evaluator))


def blocks(folder: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)


def shell(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_card_has_the_picture_of_the_report(run: Path, tmp_path: Path) -> None:
    assert shell("report", run, "--device", "cpu") == 0
    picture = run / "before-after.png"
    assert shell("export", run, "--card", "--output", tmp_path / "given", "--license", "mit") == 0
    assert (tmp_path / "given/before-after.png").read_bytes() == picture.read_bytes()
    assert "](before-after.png)" in (tmp_path / "given/README.md").read_text()


def test_the_card_and_its_files(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = sha256_of(run / "model.safetensors")
    result(run / "mine.json", digest, fid=12.5, recall=0.5)
    result(run / "others.json", "f" * 64, fid=99.0)
    result(tmp_path / "far.json", None, precision=0.75)
    objects = Result("geneval", {"overall": 0.5}, {"count": 8}, None, None, {"name": "GenEval (shapes detector)"})
    write_result(tmp_path / "objects.json", objects)
    monkeypatch.chdir(tmp_path)
    asked = ["--license", "mit", "--base-model", "me/base"]
    asked += ["--results", tmp_path / "far.json", tmp_path / "objects.json"]
    assert shell("export", run, "--card", "--output", "given", *asked) == 0
    assert {path.name for path in Path("given").iterdir()} == {
        "README.md", "recipe.yaml", "model.safetensors", "llamagen.pt",
    }  # fmt: skip

    card = ModelCard.load("given/README.md", ignore_metadata_errors=False)
    assert card.data.license == "mit"
    assert card.data.base_model == "me/base"
    assert card.data.model_name == "given"
    assert "arxiv:2512.19680" in card.data.tags
    told = {(one.metric_type, one.metric_value, one.dataset_name) for one in card.data.eval_results}
    measured = {(n, v, "cifar10[test]") for n, v in (("fid", 12.5), ("recall", 0.5), ("precision", 0.75))}
    assert told == measured | {("overall", 0.5, "prompts")}
    for line in (
        "| FID | 12.5 |",
        "distribution: samples 90; guidance 1.5; seed 7; against cifar10[test]; by dinov2.",
        "geneval: samples 8; by GenEval (shapes detector).",
        f"| `model.safetensors`, sha256 | `{digest}` |",
        f"| `llamagen.pt`, sha256 | `{sha256_of('given/llamagen.pt')}` |",
        "2 updates of 8 images of 16 pixels",
    ):
        assert line in card.text, line
    assert yaml.safe_load(Path("given/recipe.yaml").read_text()) == yaml.safe_load((run / "recipe.yaml").read_text())

    tuned = load_generator(run)
    original: Any = torch.load("given/llamagen.pt", weights_only=True)
    assert same(original, to_original(tuned))
    assert same(dict(load_generator("given").state_dict()), dict(tuned.state_dict()))
    (command,) = blocks(Path("given"), "sh")
    assert main(shlex.split(command)[1:]) == 0
    assert len([*Path("samples").glob("0*.png")]) == tiny.GENERATOR.num_classes


def test_llamagens_own_command_is_there_for_a_size_with_a_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, "xxl", (2, 32, 2))
    export_with_card(run, tmp_path / "given", name="me/given", licence="other", licence_link="https://there")
    command = blocks(tmp_path / "given", "sh")[1]
    assert "sample_c2i.py --gpt-ckpt llamagen.pt --from-fsdp --gpt-model GPT-XXL --image-size 16" in command
    data = ModelCard.load(tmp_path / "given/README.md").data
    assert (data.license, data.license_link, data.model_name) == ("other", "https://there", "given")
    assert data.base_model is None


def test_a_tokenizer(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=1", method="tokenizer_decoder"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert shell("export", run, "--card", "--license", "mit", "--output", "given") == 0
    scope: dict[str, Any] = {}
    exec(blocks(Path("given"), "python")[0], scope)
    assert same(dict(scope["tokenizer"].state_dict()), dict(load_tokenizer(run).state_dict()))
    assert set(torch.load("given/llamagen.pt", weights_only=True)) == {"model"}


def test_what_is_refused(run: Path, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(tmp_path / "others.json", "f" * 64, fid=99.0)
    before = contents(tmp_path)
    given = ("--card", "--output", tmp_path / "given")
    for arguments, message in (
        ((run, *given), "--license is missing"),
        ((run, *given, "--license", "other"), "--license other needs --license-link"),
        ((run, *given, "--license", "mit", "--license-link", "x"), "no other licence has one"),
        ((run, *given, "--license", "mit", "--results", tmp_path / "others.json"), "was measured on other weights"),
        ((run, *given, "--tokenizer"), "--tokenizer is for checkpoints"),
        ((pair / "generator.safetensors", *given, "--license", "mit"), "is no finished run"),
        ((run, "--output", tmp_path / "x.pt", "--license", "mit"), "--license is for the model card: add --card"),
    ):
        assert shell("export", *arguments) == 2
        assert message in capsys.readouterr().err
    assert shell("push", run, "me/a@b", "--license", "mit") == 2
    assert "is not the name of a repository" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_push(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before, sent = contents(run), {}
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = "https://the.hub/me/given"
    api.upload_folder.side_effect = lambda **asked: sent.update(contents(Path(asked["folder_path"])))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    assert shell("push", run, "me/given", "--license", "mit", "--private") == 0
    assert capsys.readouterr().out == "uploaded to https://the.hub/me/given\n"
    api.create_repo.assert_called_once_with("me/given", private=True, exist_ok=True)
    assert api.upload_folder.call_args.kwargs["repo_id"] == "me/given"
    assert set(sent) == {"README.md", "recipe.yaml", "model.safetensors", "llamagen.pt"}
    assert sent["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert "varpi sample me/given" in sent["README.md"].decode()
    assert contents(run) == before

    response = type("Response", (), {"status_code": 403, "headers": {}, "request": None, "url": ""})()
    api.create_repo.side_effect = HfHubHTTPError("Forbidden", response=response)
    assert shell("push", run, "me/given", "--license", "mit") == 2
    assert "me/given: the Hub does not permit it; log in" in capsys.readouterr().err
    api.create_repo.side_effect = ConnectionError("no route")
    assert shell("push", run, "me/given", "--license", "mit") == 2
    assert "me/given: could not be uploaded (ConnectionError: no route)" in capsys.readouterr().err
    assert contents(run) == before


def test_embedded_weights_have_our_licence(tmp_path: Path) -> None:
    from varpi.recipe import load_recipe

    settings = ["training.steps=1", "training.batch_size=4", "training.save_every=1", "method.group_size=2"]
    run = quiet(load_recipe("digits", settings), tmp_path / "run")
    export_with_card(run, tmp_path / "given", name="given")
    assert ModelCard.load(tmp_path / "given/README.md").data.license == "apache-2.0"
    assert load_file(tmp_path / "given/model.safetensors").keys() == load_file(run / "model.safetensors").keys()
