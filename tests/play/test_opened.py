"""What the playground opens: pairs that belong together, the reward of the run, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from play_parts import playground

from varpi.errors import VarpiError
from varpi.methods.va_pi import Settings
from varpi.networks import perceptual
from varpi.networks.perceptual import ConvPerceptual
from varpi.play.opened import Player, Playground, open_playground
from varpi.training.loop import train
from varpi.weights import save_generator
from varpi.weights.pair import Pair, open_pair


def opened(source: object, **more: Any) -> Playground:
    return open_playground(str(source), lambda name, tokenizer: open_pair(name, tokenizer=tokenizer), **more)


@pytest.fixture(scope="module")
def run(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of VA-π, of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny.recipe(pair, "training.steps=2", "method.context_noise=0.3"), folder)
    return folder


def same_weights(one: Pair, other: Pair) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.generator.parameters(), other.generator.parameters(), strict=True))


def test_a_run_stands_beside_what_it_started_from(run: Path, pair: Path) -> None:
    ground = opened(run)
    assert [player.name for player in ground.players] == [f"{pair / 'generator.safetensors'}, before", str(run)]
    before, after = (player.pair for player in ground.players)
    start = open_pair(pair / "generator.safetensors", tokenizer=pair / "tokenizer.safetensors")
    assert same_weights(before, start)
    assert not same_weights(after, start)
    assert ground.pair is after
    assert not any(player.pair.generator.training for player in ground.players)
    assert ground.settings.context_noise == 0.3
    assert ground.about_reward == "The reward and its settings are the run's."
    assert [player.name for player in opened(run, alone=True).players] == [str(run)]


def test_another_generator_borrows_the_tokenizer_of_the_run(run: Path, pair: Path) -> None:
    other = pair / "generator.safetensors"
    ground = opened(run, compare=str(other))
    assert [player.name for player in ground.players] == [str(other), str(run)]


def test_a_run_that_trained_a_decoder_stands_beside_the_decoder_it_started_from(pair: Path, tmp_path: Path) -> None:
    train(tiny.recipe(pair, "training.steps=1", method="tokenizer_decoder"), tmp_path / "run")
    before, after = (player.pair for player in opened(tmp_path / "run").players)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    assert same_weights(before, after)
    assert not torch.equal(before.tokenizer.decode(tokens), after.tokenizer.decode(tokens))


def test_the_embedded_digits_have_names_and_the_reward_of_their_recipe() -> None:
    ground = opened("digits")
    assert len(ground.players) == 1
    assert ground.classes() == [(str(i), i) for i in range(10)]
    assert isinstance(ground.perceptual, ConvPerceptual)
    assert (ground.settings.group_size, ground.settings.reward.perceptual_weight) == (16, 5.0)
    assert ground.about_reward == "The reward and its settings are those of the recipe digits."


def test_lpips_is_not_downloaded_but_left_out_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(perceptual, "cached_trunk", lambda net: tmp_path / f"{net}.pth")
    ground = opened("cifar10")
    assert ground.perceptual is None
    assert (ground.settings.reward.mse_weight, ground.settings.reward.perceptual_weight) == (1.0, 0.0)
    assert "LPIPS is left out: its weights, vgg.pth, are not here" in ground.about_reward
    assert ground.classes()[3] == ("3 · cat", 3)
    with pytest.raises(VarpiError, match="there is no weights file"):
        opened("cifar10", perceptual_weights=str(tmp_path / "none.pth"))


def test_a_run_whose_only_reward_is_lpips_is_judged_by_pixels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Path
) -> None:
    monkeypatch.setattr(perceptual, "cached_trunk", lambda net: tmp_path / "none.pth")
    text = (run / "recipe.yaml").read_text()
    changed = text.replace("mse_weight: 1.0", "mse_weight: 0.0").replace(
        "perceptual_weight: 0.0", "perceptual_weight: 1.0"
    )
    assert changed != text
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "recipe.yaml").write_text(changed)
    (copy / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert opened(copy, alone=True).settings.reward.mse_weight == 1.0


def test_weights_for_no_lpips_are_refused(run: Path) -> None:
    with pytest.raises(VarpiError, match=r"--perceptual-weights is given, but the reward here has no LPIPS"):
        opened(run, perceptual_weights="vgg16.pth")


def test_classes_by_name_number_and_imagenet() -> None:
    assert playground().classes() == [("0 · a", 0), ("1 · b & c", 1), ("2 · d", 2)]
    assert playground(class_names=None).classes() == [("class 0", 0), ("class 1", 1), ("class 2", 2)]
    names = ("n01440764", "fish", "2", "more than it knows")
    assert playground(class_names=names).classes() == [("0 · tench", 0), ("1 · fish", 1), ("2", 2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 4}, r"cannot stand side by side: their conditions are 3 classes and 4 classes"),
        ({"grid": 8}, r"cannot stand side by side: their grids of tokens are 4x4 and 8x8"),
    ],
)
def test_pairs_that_draw_different_things_are_refused(changes: dict[str, Any], message: str) -> None:
    other = tiny.generator(replace(tiny.GENERATOR, **changes))
    players = (playground().players[0], Player("other", Pair(other, tiny.tokenizer())))
    with pytest.raises(VarpiError, match=f"^tiny and other {message}$"):
        Playground(players, Settings(name="va_pi"), None, "", None)


def text_generator(folder: Path) -> Path:
    config = replace(tiny.GENERATOR, conditioning="text", condition_tokens=8, caption_dim=128)
    save_generator(tiny.generator(config), folder / "text.safetensors")
    return folder / "text.safetensors"


def test_prompts_need_what_makes_features_of_them(pair: Path, tmp_path: Path) -> None:
    source = text_generator(tmp_path)

    def ground(encoder: str | None) -> Playground:
        tokenizer = pair / "tokenizer.safetensors"
        return open_playground(
            str(source), lambda name, _: open_pair(name, tokenizer=tokenizer, text_encoder=encoder), compare=str(source)
        )

    with pytest.raises(VarpiError, match=r"text\.safetensors: this generator reads caption features.*--text-encoder"):
        ground(None)
    assert ground("digits").classes() == []


def test_a_source_that_is_not_there_is_refused() -> None:
    with pytest.raises(VarpiError, match="no such file or directory"):
        opened("runs/none")


def test_settings_of_a_stranger_are_the_defaults(pair: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(perceptual, "cached_trunk", lambda net: tmp_path / "none.pth")
    ground = open_playground(
        str(pair / "generator.safetensors"), lambda name, _: open_pair(name, tokenizer=pair / "tokenizer.safetensors")
    )
    assert ground.about_reward.startswith("The reward and its settings are VA-π's defaults. LPIPS is left out")
    assert ground.settings.group_size == 8
    assert np.isclose(ground.settings.reward.mse_weight, 1.0)
