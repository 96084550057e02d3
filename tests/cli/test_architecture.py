"""A size without a name, by its fields in a JSON file: on the command line and in a recipe."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from training_runs import contents

from varpi.cli.main import main
from varpi.errors import VarpiError
from varpi.generators import LlamaGen
from varpi.recipe import load_recipe
from varpi.weights import export_original
from varpi.weights.load import fresh


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny pair in LlamaGen's own files, which do not tell its shape, and two JSON files that do."""
    monkeypatch.chdir(tmp_path)
    export_original(tiny.generator(), "generator.pt")
    export_original(tiny.tokenizer(), "tokenizer.pt")
    Path("my-size.json").write_text(json.dumps(dataclasses.asdict(tiny.GENERATOR)))
    Path("my-codes.json").write_text(json.dumps(dataclasses.asdict(tiny.TOKENIZER)))
    return tmp_path


SAMPLE = ["sample", "generator.pt", "--tokenizer", "tokenizer.pt", "--count", "2", "--output", "samples"]


def test_on_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--architecture", "my-size.json", "--tokenizer-architecture", "my-codes.json"]
    assert main([*SAMPLE, *shape]) == 0, capsys.readouterr().err
    tiny.make(place)
    ours = ["sample", "generator.safetensors", "--tokenizer", "tokenizer.safetensors", "--count", "2"]
    assert main([*ours, "--output", "ours"]) == 0
    assert (place / "samples" / "00001.png").read_bytes() == (place / "ours" / "00001.png").read_bytes()


def test_in_a_recipe_it_becomes_the_fields(place: Path) -> None:
    tiny.make(place)
    values = yaml.safe_load(Path("next_token.yaml").read_text())
    values["generator"] = {"architecture": "my-size.json"}
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe("mine.yaml", ["tokenizer.architecture=my-codes.json"])
    assert recipe.generator is not None
    assert recipe.generator.architecture == dataclasses.asdict(tiny.GENERATOR)
    assert yaml.safe_load(recipe.to_yaml())["tokenizer"]["architecture"]["channels"] == tiny.TOKENIZER.channels
    assert main(["train", "mine.yaml", "--set", "training.steps=1", "--output", "run", "--device", "cpu"]) == 0


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "my-size.json: cannot be read as JSON (FileNotFoundError"),
        ("{", "my-size.json: cannot be read as JSON"),
        ("[" * 100_000, "my-size.json: cannot be read as JSON (RecursionError"),
        ("[1]", "my-size.json: is a JSON list, not the fields of a configuration"),
        ('{"dimm": 32}', "dimm"),
        ('{"dim": 1e9, "n_layer": 2, "n_head": 2}', "dim is 1000000000.0; it must be a whole number"),
        ('{"dim": 32, "n_layer": 1000000000, "n_head": 2}', "n_layer is 1000000000; it must be at most"),
        ('{"dim": 16777216, "n_layer": 1, "n_head": 1}', "make a rotary table of more than 1 GiB"),
    ],
)
def test_files_that_are_refused(
    content: str | None, line: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my-size.json").unlink()
    if content is not None:
        Path("my-size.json").write_text(content)
    before = contents(place)
    assert main([*SAMPLE, "--architecture", "my-size.json", "--tokenizer-architecture", "my-codes.json"]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert contents(place) == before


def test_in_a_recipe_a_wrong_file_is_named_with_its_key(place: Path) -> None:
    tiny.make(place)
    with pytest.raises(VarpiError, match=r"next_token\.yaml: generator\.architecture: nowhere\.json: cannot be read"):
        load_recipe("next_token.yaml", ["generator.architecture=nowhere.json"])


def test_a_fresh_model_larger_than_the_machine_is_refused_before_it_is_made(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.make(place)
    monkeypatch.setattr("varpi.runtime.memory.physical_memory", lambda: 2**34)
    size = "{dim: 65536, n_layer: 100, n_head: 512, vocab_size: 32, grid: 4}"
    settings = ["generator.source=null", f"generator.architecture={size}"]
    command = ["train", "next_token.yaml", "--output", "run", "--device", "cpu"]
    assert main([*command, *(part for setting in settings for part in ("--set", setting))]) == 2
    said = capsys.readouterr().err  # 12 dim² weights a layer, of 4 bytes each
    assert "the weights of generator.architecture: 19207 GiB are needed, and this machine has 16" in said


def test_counting_the_weights_draws_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = LlamaGen(tiny.GENERATOR).state_dict()
    torch.manual_seed(3)
    found = fresh("generator", tiny.GENERATOR, "it").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
