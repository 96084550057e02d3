"""Janus from a directory of transformers through the command line, to a directory that transformers loads."""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
import yaml
from cases import WHICH, caption_case, captioned
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from training_runs import crash, numbers, quiet, same, weights
from transformers import AutoTokenizer, JanusForConditionalGeneration

from varpi.cli.main import main
from varpi.errors import VarpiError
from varpi.generators.janus import Janus
from varpi.recipe import Recipe, load_recipe
from varpi.weights import export_original, load_generator, load_tokenizer
from varpi.weights.pair import open_generator

CAPTIONS = ("a red cat", "the blue moon", "a small dog under the moon", "a sleeping cat on a dog")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Janus as it is released, a tar shard with captions, and a recipe. Read only."""
    folder = tmp_path_factory.mktemp("janus")
    hf.save(hf.janus(), folder / "model")
    with tarfile.open(folder / "00000.tar", "w") as shard:
        for i in range(12):
            draws = torch.Generator().manual_seed(i)
            pixels = torch.randint(256, (16, 16, 3), generator=draws, dtype=torch.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(png, "png")
            for name, content in ((f"{i}.png", png.getvalue()), (f"{i}.txt", CAPTIONS[i % 4].encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    method = {"name": "va_pi", "group_size": 4, "context_noise": 0.9, "condition_drop": 0.2}
    values: dict[str, Any] = {
        "method": {**method, "reward": {"perceptual_weight": 0}},
        "generator": {"source": str(folder / "model")},
        "tokenizer": {"source": str(folder / "model")},
        "data": {"source": str(folder / "00000.tar"), "image_size": 16},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 4, "batch_size": 4, "micro_batch": 2, "save_every": 2, "gradient_checkpointing": True},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


def recipe(place: Path, *settings: str) -> Recipe:
    return load_recipe(place / "recipe.yaml", list(settings))


def test_a_dropout_that_it_does_not_have(place: Path) -> None:
    open_generator(recipe(place, "generator.dropout=0"), "cpu")
    with pytest.raises(VarpiError, match=r"generator\.dropout is 0\.1, but a Janus has none to set"):
        open_generator(recipe(place, "generator.dropout=0.1"), "cpu")


@pytest.mark.parametrize("which", WHICH)
def test_captions_beyond_the_context_are_left_out(
    which: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In training, in validation, and where they are sampled; a prompt that was chosen is refused instead."""
    long, source, run = caption_case(which, "too-long.jsonl", tmp_path / "data"), tmp_path / "splits", tmp_path / "run"
    for split in ("train", "val"):
        captioned(source / split, "a.jsonl", []).write_bytes(long.read_bytes())
    settings = ["data.workers=2", f"data.source={source}", "validation.every=2", "training.save_every=1"]
    chosen = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", str(place / "recipe.yaml"), "--output", str(run), "--device", "cpu", *chosen]) == 0
    reason = "with a caption too long for the generator"
    example = r"a.jsonl:4: the caption 'cat cat .*'… makes 2\d\d\d tokens; 32 fit into the context\)"
    held_out = rf"{source}\[validation\]: left out 1 of 4 held-out images: 1 {reason} \({source}/val/{example}"
    said = [record.getMessage() for record in caplog.records]
    assert len([line for line in said if re.fullmatch(held_out, line)]) == 1  # though it validated twice
    counted = rf"{source}: left out (\d+) of (\d+) images: \1 {reason} \({source}/train/{example}"
    opened = re.fullmatch(counted, said[-1])
    assert opened is not None
    assert int(opened[2]) == 16 + int(opened[1]) > 16

    sample = ["sample", str(run), "--device", "cpu"]
    captions = ["--captions", str(long), "--caption-split", "train", "--output", str(tmp_path / "images")]
    assert main([*sample, *captions]) == 0
    assert json.loads((tmp_path / "images" / "sample.json").read_text())["prompts"] == ["a red cat", "moon", "the dog"]
    line = f"--captions {long}: left out 1 of 4 captions: 1 {reason} ({long}:4: "
    assert caplog.records[-1].getMessage().startswith(line)
    assert main([*sample, "--prompt", "moon", "--prompt", "cat " * 99, "--output", str(tmp_path / "more")]) == 2
    assert "varpi sample: prompt 1: the caption 'cat cat" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_what_is_trained_loads_with_from_pretrained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(place / "recipe.yaml"), "--output", str(run), "--device", "cpu"]) == 0
    assert numbers(run)[0]["ratio_mean"] == 1
    before, after = load_file(place / "model" / "model.safetensors"), weights(run)
    assert before.keys() == after.keys()
    trained = ("model.language_model.", "model.generation_")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(trained)}

    theirs, report = JanusForConditionalGeneration.from_pretrained(run, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours: Any = load_generator(run)
    condition = ours.prepare_condition(["a red cat"])
    assert AutoTokenizer.from_pretrained(run).decode(condition.ids[0, -1]) == hf.BOI
    tokens = torch.arange(16)[None]
    inputs = torch.cat([theirs.get_input_embeddings()(condition.ids), ours._embed_images(tokens[:, :-1])], dim=1)
    with torch.no_grad():
        hidden = theirs.model.language_model(inputs_embeds=inputs).last_hidden_state[:, -16:]
        torch.testing.assert_close(ours.logits(tokens, condition), theirs.model.generation_head(hidden))

    command = ["sample", str(run), "--prompt", "the blue moon", "--guidance-scale", "5", "--output"]
    assert main([*command, str(tmp_path / "images")]) == 0
    assert json.loads((tmp_path / "images" / "sample.json").read_text())["prompts"] == ["the blue moon"]
    assert main(["report", str(run), "--samples", "1", "--device", "cpu"]) == 0
    assert "a small dog under the moon" in (run / "report.html").read_text()
    assert main(["export", str(run), "--output", str(tmp_path / "exported")]) == 0
    assert same(load_file(tmp_path / "exported" / "model.safetensors"), after)
    again: Any = load_generator(tmp_path / "exported")
    assert torch.equal(again.logits(tokens, condition), ours.logits(tokens, condition))


def test_a_directory_with_a_card_loads_by_what_the_card_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = quiet(recipe(place, "training.steps=2"), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "--card", "--license", "mit", "--output", "given"]) == 0
    card = ModelCard.load("given/README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-to-image")
    (python,) = re.findall(r"```python\n(.*?)\n```", card.text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(python, scope)
    assert isinstance(scope["model"], JanusForConditionalGeneration)
    assert same(weights(run), weights(Path("given")))
    (command,) = re.findall(r"```sh\n(.*?)\n```", card.text, re.DOTALL)
    assert main(shlex.split(command)[1:]) == 0
    assert Path("samples/00000.png").is_file()


def test_resume_equals_no_interruption(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quiet(recipe(place), tmp_path / "whole")
    crash(monkeypatch, recipe(place), tmp_path / "cut", 3)
    resumed = quiet(recipe(place), tmp_path / "cut", resume=True)
    assert same(weights(whole), weights(resumed))
    assert numbers(whole) == numbers(resumed)


def test_adapters_are_merged_and_touch_the_language_model_alone(place: Path, tmp_path: Path) -> None:
    run = quiet(recipe(place, "lora.rank=2", "lora.targets=[q_proj, down_proj]"), tmp_path / "run")
    before, after = load_file(place / "model" / "model.safetensors"), weights(run)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = ("q_proj.weight", "down_proj.weight")
    assert moved == {name for name in before if name.startswith("model.language_model") and name.endswith(adapted)}
    assert len(moved) == 4


def test_compat_reaches_the_model(place: Path, tmp_path: Path) -> None:
    """With the released shift and no noise the model sees what it predicts, so the first losses differ."""
    clean = ("method.context_noise=0", "training.steps=2")
    right = quiet(recipe(place, *clean), tmp_path / "right")
    shifted = quiet(recipe(place, *clean, "generator.compat.shifted_logits=true"), tmp_path / "shifted")
    assert numbers(right)[0]["cross_entropy"] != numbers(shifted)[0]["cross_entropy"]
    with pytest.raises(VarpiError, match="Janus has no compat setting 'shifted'; known are shifted_logits"):
        quiet(recipe(place, "generator.compat.shifted=true"), tmp_path / "unknown")


def test_its_tokenizer_is_found_in_the_same_checkpoint(place: Path, tmp_path: Path) -> None:
    run = quiet(recipe(place, "training.steps=2"), tmp_path / "run")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    one, other = load_tokenizer(place / "model"), load_tokenizer(run)
    assert torch.equal(one.encode(images), other.encode(images))


def test_other_checkpoints_are_refused(place: Path, tmp_path: Path) -> None:
    tensors = load_file(place / "model" / "model.safetensors")
    headless = {name: tensor for name, tensor in tensors.items() if ".generation_head." not in name}
    with pytest.raises(VarpiError, match="has no image head"):
        load_generator(headless, architecture="janus-pro-1b")
    with pytest.raises(
        VarpiError, match="no generator architecture is called 'janus-pro-1'; did you mean 'janus-pro-1b'"
    ):
        load_generator(place / "model", architecture="janus-pro-1")
    with pytest.raises(VarpiError, match=r"config\.json says hidden_size \d+, but a janus-pro-1b has 2048; leave out"):
        load_generator(place / "model", architecture="janus-pro-1b")
    one_missing = {name: tensor for name, tensor in tensors.items() if not name.endswith("layers.1.mlp.up_proj.weight")}
    with pytest.raises(VarpiError, match=r"1 missing: .*layers\.1\.mlp\.up_proj\.weight"):
        load_generator(_saved(one_missing, place, tmp_path))
    with pytest.raises(VarpiError, match="image_size is 384, but the generator's grid is 4x4"):
        load_generator(place / "model", image_size=384)


def test_config_of_another_model(place: Path, tmp_path: Path) -> None:
    folder = _saved(load_file(place / "model" / "model.safetensors"), place, tmp_path)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(VarpiError, match=r"config\.json says model_type 'bert'; varpi knows .*janus"):
        load_generator(folder)


def test_export_of_a_generator_in_memory(place: Path, tmp_path: Path) -> None:
    generator = load_generator(place / "model")
    assert isinstance(generator, Janus)
    export_original(generator, tmp_path / "exported")
    assert same(
        load_file(tmp_path / "exported" / "model.safetensors"), load_file(place / "model" / "model.safetensors")
    )


def _saved(tensors: dict[str, torch.Tensor], place: Path, folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    return folder
