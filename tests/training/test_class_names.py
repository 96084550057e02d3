"""Names of classes: between the data, the generator and the file that a run leaves behind."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import tiny
from safetensors import safe_open
from training_runs import quiet

from varpi.errors import VarpiError
from varpi.weights import export_original, load_generator
from varpi.weights.class_names import stored_class_names


def classes_in(path: Path) -> list[str] | None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return json.loads(metadata["classes"]) if "classes" in metadata else None


def recipe(pair: Path, source: Path, *settings: str):
    return tiny.recipe(pair, f"data.source={source}", "training.steps=1", *settings, method="next_token")


@pytest.fixture
def named(pair: Path, tmp_path: Path) -> Path:
    """The model of a run on the classes a, b, c."""
    return quiet(recipe(pair, pair / "images"), tmp_path / "named") / "model.safetensors"


def test_a_run_stores_the_names_and_exports_them(named: Path, tmp_path: Path) -> None:
    assert classes_in(named) == ["a", "b", "c"]
    assert stored_class_names(named.parent) == ("a", "b", "c")
    generator = load_generator(named)
    assert generator.class_names == ("a", "b", "c")
    export_original(generator, tmp_path / "exported.safetensors")
    assert classes_in(tmp_path / "exported.safetensors") == ["a", "b", "c"]
    assert load_generator(tmp_path / "exported.safetensors", architecture=tiny.GENERATOR).class_names == ("a", "b", "c")


def test_fewer_classes_than_an_unnamed_generator_knows_are_refused(pair: Path, tmp_path: Path) -> None:
    few = tiny.images(tmp_path / "few", "ac", 4)
    with pytest.raises(
        VarpiError, match=r"few names 2 classes \(a, c, …\), the generator knows 3 and no names"
    ) as caught:
        quiet(recipe(pair, few), tmp_path / "run")
    assert "set data.classes to the names of all of them" in str(caught.value)
    assert not (tmp_path / "run").exists()
    run = quiet(recipe(pair, few, "data.classes=[a, b, c]"), tmp_path / "listed")
    assert classes_in(run / "model.safetensors") == ["a", "b", "c"]


def test_as_many_classes_are_taken_in_their_order_and_that_is_said(
    pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        quiet(recipe(pair, pair / "images"), tmp_path / "run")
    assert "has no names for its classes; those of" in caplog.text
    assert "0 is a, 1 is b, …" in caplog.text


def test_a_named_generator_numbers_the_data(named: Path, pair: Path, tmp_path: Path) -> None:
    """A subset gets the generator's ids; a name that it has not is refused."""
    from varpi.data.opening import open_batches
    from varpi.runtime.processes import World
    from varpi.weights.class_names import known_class_names

    few = tiny.images(tmp_path / "few", "c", 4)
    asked = recipe(pair, few, f"generator.source={named}")
    batches = open_batches(asked, World(rank=0, size=1, device="cpu"), known_class_names(asked))
    assert set(batches.at(0).condition.tolist()) == {2}  # type: ignore[union-attr]
    run = quiet(asked, tmp_path / "run")
    assert classes_in(run / "model.safetensors") == ["a", "b", "c"]
    other = tiny.images(tmp_path / "other", "ad", 4)
    with pytest.raises(VarpiError, match=r"1 of its 2 classes \(d\) are none of the 3 known ones \(a, b, c, …\)"):
        quiet(recipe(pair, other, f"generator.source={named}"), tmp_path / "refused")


def test_validation_classes_are_numbered_as_those_of_training(pair: Path, tmp_path: Path) -> None:
    """A split without b: c is class 2 in both, so the loss is that of the full split's images of a and c."""
    from varpi.data.opening import open_batches, open_held_out
    from varpi.runtime.processes import World

    shutil.copytree(pair / "images", tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "val" / "b")
    asked = recipe(pair, tmp_path / "images", "validation={every: 1, split: validation}")
    held_out = open_held_out(asked, "validation", open_batches(asked, World(rank=0, size=1, device="cpu")))
    assert [held_out[index].condition for index in range(len(held_out))] == [0, 0, 2, 2]
    (tmp_path / "images" / "val" / "d").mkdir()
    with pytest.raises(VarpiError, match=r"1 of its 3 classes \(d\) are none of the 3 known"):
        open_held_out(asked, "validation", open_batches(asked, World(rank=0, size=1, device="cpu")))


def test_damaged_names_are_refused(pair: Path, tmp_path: Path) -> None:
    from varpi.weights import save_generator

    save_generator(tiny.generator(), tmp_path / "a.safetensors", extra={"classes": "[1, 2]"})
    with pytest.raises(VarpiError, match=r"a\.safetensors: its metadata 'classes' is not a JSON list of class names"):
        load_generator(tmp_path / "a.safetensors")
