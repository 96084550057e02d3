"""A method is one file: a module dropped into `varpi.methods` is all that a recipe needs to train with it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import varpi.methods
from varpi.errors import VarpiError
from varpi.recipe import load_recipe, parse_recipe
from varpi.training import train

MODULE = '''"""Cross-entropy times a factor."""

from varpi.methods import Outcome, next_token
from varpi.methods.teacher_forcing import parts
from varpi.recipe import MethodSection, Recipe, Weight


class Settings(MethodSection):
    """Next-token training, scaled."""

    needs = ("generator", "tokenizer")

    factor: Weight = 2.0
    """Times the loss."""
    condition_drop: float = 0.0

    def check(self, recipe: Recipe) -> None:
        if recipe.training.batch_size == 7:
            raise ValueError("method scaled dislikes batches of 7")


class Scaled(next_token.NextToken):
    def loss(self, batch, step, rollout=None):
        outcome = super().loss(batch, step)
        return Outcome(outcome.loss * self.settings.factor, outcome.metrics)


def from_recipe(recipe, num_classes, device):
    return Scaled(**parts(recipe, num_classes, device))
'''


@pytest.fixture
def scaled(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A recipe that names a method which this package does not have by itself."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "scaled.py").write_text(MODULE)
    monkeypatch.setattr(varpi.methods, "__path__", [*varpi.methods.__path__, str(folder)])
    values = yaml.safe_load((pair / "next_token.yaml").read_text())
    values["method"] = {"name": "scaled", "factor": 3}
    values["training"]["steps"] = 2
    path = tmp_path / "scaled.yaml"
    path.write_text(yaml.safe_dump(values))
    yield path
    sys.modules.pop("varpi.methods.scaled", None)
    vars(varpi.methods).pop("scaled", None)


def test_trains_from_a_recipe(scaled: Path, pair: Path, tmp_path: Path) -> None:
    recipe = load_recipe(scaled)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert yaml.safe_load(recipe.to_yaml())["method"] == {"name": "scaled", "factor": 3.0, "condition_drop": 0.0}
    run = train(recipe, tmp_path / "run", device="cpu", show=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == pytest.approx([3 * row["cross_entropy"] for row in rows])
    before, after = load_file(pair / "generator.safetensors"), load_file(run / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["method.facto=1"], "unknown key method.facto; did you mean factor?"),
        (["method.factor=-1"], "method.factor is -1; it must be greater than or equal to 0"),
        (["method.name=scald"], "method.name is 'scald'; it must be one of '"),
        (["training.batch_size=7"], "method scaled dislikes batches of 7"),
        (["tokenizer=null"], "method scaled needs a tokenizer"),
        (["training.updates_per_batch=2"], "training.updates_per_batch is 2, but method scaled has no rollouts"),
    ],
)
def test_its_mistakes_are_explained_like_any_others(scaled: Path, settings: list[str], line: str) -> None:
    with pytest.raises(VarpiError) as caught:
        load_recipe(scaled, settings)
    assert str(caught.value).startswith(f"scaled.yaml: {line}")
