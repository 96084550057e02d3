"""The pair: where its parts come from, what must fit, and the names of its classes."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from varpi.errors import VarpiError
from varpi.runtime.tensors import read_checkpoint
from varpi.weights import export_original, load_generator, load_tokenizer, save_generator
from varpi.weights.pair import Pair, open_pair, recipe_of

FIELDS: dict[str, Any] = dataclasses.asdict(tiny.GENERATOR)


def test_an_embedded_pair_brings_its_tokenizer() -> None:
    pair = open_pair("digits")
    assert pair.image_size == 32
    assert pair.generator.vocab_size == pair.tokenizer.codebook_size
    assert torch.equal(pair.tokenizer.state_dict()["quant_conv.weight"], load_tokenizer("digits").quant_conv.weight)  # pyright: ignore


@pytest.fixture
def run(pair: Path, tmp_path: Path) -> Path:
    """What a run leaves: its recipe and its model."""
    folder = tmp_path / "run"
    folder.mkdir()
    values = yaml.safe_load((pair / "next_token.yaml").read_text())
    values["tokenizer"]["architecture"] = json.loads(json.dumps(dataclasses.asdict(tiny.TOKENIZER)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    shutil.copyfile(pair / "generator.safetensors", folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("part", [".", "model.safetensors"])
def test_a_run_knows_its_tokenizer(run: Path, part: str) -> None:
    pair = open_pair(run / part)
    assert pair.image_size == tiny.IMAGE_SIZE
    assert torch.equal(pair.tokenizer.state_dict()["quant_conv.weight"], tiny.tokenizer().quant_conv.weight)
    recipe = recipe_of(run / part)
    assert recipe is not None
    assert recipe.method.name == "next_token"


def test_a_run_that_trained_a_tokenizer_knows_its_generator(
    pair: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LlamaGen's own files do not tell their image size, and settings of compat change what a generator does."""
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["method"] = {"name": "tokenizer_decoder", "reward": {"perceptual_weight": 0}}
    values["generator"] |= {"source": "c2i_B_256.pt", "architecture": "llamagen-c2i-b", "compat": {"some": True}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    shutil.copyfile(pair / "tokenizer.safetensors", run / "model.safetensors")
    asked: dict[str, Any] = {}

    def load(source: Any, **options: Any) -> Any:
        asked.update(source=source, **options)
        return tiny.generator()

    monkeypatch.setattr("varpi.weights.pair.load_generator", load)
    open_pair(run)
    expected = {"source": "c2i_B_256.pt", "architecture": "llamagen-c2i-b", "image_size": 16, "compat": {"some": True}}
    assert expected.items() <= asked.items()


def test_anything_else_needs_one(pair: Path, run: Path) -> None:
    (run / "copy.safetensors").write_bytes((pair / "generator.safetensors").read_bytes())
    for source in (pair / "generator.safetensors", run / "copy.safetensors"):
        with pytest.raises(VarpiError, match=r"the tokenizer is missing \(--tokenizer\)"):
            open_pair(source)
        assert open_pair(source, tokenizer=pair / "tokenizer.safetensors").image_size == tiny.IMAGE_SIZE


def test_parts_that_do_not_fit_are_refused(run: Path) -> None:
    with pytest.raises(VarpiError, match="vocabulary has 32 tokens, the tokenizer's codebook 128"):
        open_pair(run, tokenizer="digits")
    with pytest.raises(VarpiError, match="vocabulary has 32 tokens, the tokenizer's codebook 16"):
        Pair(tiny.generator(), tiny.tokenizer(dataclasses.replace(tiny.TOKENIZER, codebook_size=16)))
    with pytest.raises(VarpiError, match="image_size is 32, but this pair makes images of 16 pixels"):
        open_pair(run, image_size=32)
    with pytest.raises(VarpiError, match="a text encoder is for generators that read caption features"):
        open_pair(run, text_encoder="digits")


def test_an_architecture_as_a_mapping_of_fields(tmp_path: Path) -> None:
    export_original(tiny.generator(), tmp_path / "c2i.pt")
    loaded: Any = load_generator(tmp_path / "c2i.pt", architecture=FIELDS)
    assert loaded.config == tiny.GENERATOR
    export_original(tiny.tokenizer(), tmp_path / "vq.pt")
    loaded = load_tokenizer(tmp_path / "vq.pt", architecture=dataclasses.asdict(tiny.TOKENIZER))
    assert loaded.config == tiny.TOKENIZER
    for fields, message in (
        ({**FIELDS, "depth": 2}, "architecture has fields that this varpi does not know: depth; it knows dim, n_layer"),
        ({"dim": 32}, "architecture is not valid: missing 2 required positional arguments"),
        ({**FIELDS, "dim": "x"}, "architecture is not valid: LlamaGenConfig: dim is 'x'; it must be a whole number"),
        ({**FIELDS, "n_layer": 3}, "the tensors say n_layer 2, but the given architecture says n_layer 3"),
        (3, "architecture is of type int; expected a name, a mapping of fields, or a LlamaGenConfig"),
    ):
        with pytest.raises(VarpiError, match=message):
            load_generator(tmp_path / "c2i.pt", architecture=fields)


# -- names of classes


def test_names_of_classes_stay_with_the_weights(tmp_path: Path) -> None:
    generator = tiny.generator()
    save_generator(generator, tmp_path / "a.safetensors")
    assert load_generator(tmp_path / "a.safetensors").class_names is None
    save_generator(generator, tmp_path / "b.safetensors", extra={"classes": '["cat", "dog", "\\u00e9lan"]'})
    loaded = open_pair(
        tmp_path / "b.safetensors", tokenizer=tiny.tokenizer().state_dict(), tokenizer_architecture=tiny.TOKENIZER
    )
    assert loaded.class_names == ("cat", "dog", "élan")
    save_generator(loaded.generator, tmp_path / "c.safetensors")
    assert json.loads(read_checkpoint(tmp_path / "c.safetensors").metadata["classes"]) == ["cat", "dog", "élan"]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ('{"cat": 0}', "metadata 'classes' is not a JSON list of class names"),
        ("[1, 2]", "metadata 'classes' is not a JSON list of class names"),
        ("[" * 100_000, "metadata 'classes' is not a JSON list of class names"),
        ('["a", "b", "c", "d"]', "names 4 classes, but its generator knows 3"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path: Path, classes: str, message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_generator(tiny.generator(), path)
    metadata = {**read_checkpoint(path).metadata, "classes": classes}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(VarpiError, match=message):
        load_generator(path)
