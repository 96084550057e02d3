"""What ships inside the package: packed from runs, with the recipe and the hash of what it was."""

import importlib.resources
import re
from pathlib import Path

import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from varpi.embedded.pack import pack
from varpi.recipe import parse_recipe
from varpi.weights import load_tokenizer, save_tokenizer, sha256_of


def test_a_packed_model_is_the_trained_one_in_bf16(tmp_path: Path) -> None:
    trained = tiny.tokenizer()
    (tmp_path / "run").mkdir()
    save_tokenizer(trained, tmp_path / "run" / "model.safetensors", extra={"recipe": "seed: 3"})
    pack(tmp_path / "run", tmp_path / "packed.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "packed.safetensors").values()} == {torch.bfloat16}
    packed = load_tokenizer(tmp_path / "packed.safetensors").state_dict()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(packed[name], tensor.bfloat16().float()), name
    with safe_open(tmp_path / "packed.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["recipe"] == "seed: 3"
    assert metadata["trained_sha256"] == sha256_of(tmp_path / "run" / "model.safetensors")


def test_the_shapes_models_say_how_they_were_made() -> None:
    folder = Path(str(importlib.resources.files("varpi.embedded")))
    files = [*folder.glob("shapes-*.safetensors")]
    assert files
    for path in files:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        recipe = parse_recipe(yaml.safe_load(metadata["recipe"]), path.name)
        assert recipe.data.source == "shapes"
        assert 0 < int(metadata["step"]) <= recipe.training.steps
        assert re.fullmatch("[0-9a-f]{64}", metadata["trained_sha256"])
    everything = [*files, *(folder / "shapes-text").iterdir()]
    assert sum(path.stat().st_size for path in everything) < 12e6
