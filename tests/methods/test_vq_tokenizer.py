"""Training of a tokenizer of photographs: the perceptual distance, and the contest with a discriminator."""

from pathlib import Path
from typing import Any

import lpips
import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors import safe_open
from training_runs import crash, numbers, quiet, same, weights

from varpi.data import Batch
from varpi.data.opening import open_training_data
from varpi.errors import VarpiError
from varpi.methods import build_method
from varpi.objective.adversarial import adversarial_loss, discriminator_loss
from varpi.recipe import Recipe, parse_recipe
from varpi.weights import load_tokenizer

CONTEST = {"adversarial_weight": 0.3, "discriminator_channels": 8, "discriminator_layers": 1}


def vq_recipe(pair: Path, **method: Any) -> Recipe:
    return parse_recipe(
        {
            "method": {"name": "vq_tokenizer", **method},
            "tokenizer": {"architecture": vars(tiny.TOKENIZER)},
            "data": {"source": str(pair / "images"), "image_size": 16, "flip": True},
            "optimizer": {"learning_rate": 3e-3, "schedule": "cosine"},
            "training": {"steps": 6, "batch_size": 8, "save_every": 2},
        }
    )


def first_batch(recipe: Recipe) -> Batch:
    data = open_training_data(recipe.data)
    images = torch.stack([data[i].image for i in range(8)])
    return Batch(images, torch.zeros(8, dtype=torch.int64), torch.arange(8), torch.arange(8), bad=0)


def test_the_loss_of_a_contest_by_hand(pair: Path) -> None:
    recipe = vq_recipe(pair, **CONTEST)
    method: Any = build_method(recipe, 3, "cpu")
    batch = first_batch(recipe)
    with torch.no_grad():
        outcome = method.loss(batch, 0)
        images, latents, codes = method.vq(batch.images)
        real, fake = method.model.discriminator(batch.images), method.model.discriminator(images)
        distance = (latents - codes).square().sum(1).mean()
        expected = F.mse_loss(images, batch.images) + 1.25 * distance
        expected += 0.3 * adversarial_loss(fake) + discriminator_loss(real, fake)
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(outcome.metrics["discriminator"], discriminator_loss(real, fake))


def test_each_side_is_moved_by_its_own_loss_alone(pair: Path) -> None:
    recipe = vq_recipe(pair, **CONTEST)
    method: Any = build_method(recipe, 3, "cpu")
    images = first_batch(recipe).images

    def moved(loss: torch.Tensor) -> set[str]:
        method.model.zero_grad()
        loss.backward(retain_graph=True)
        touched = (name for name, p in method.model.named_parameters() if p.grad is not None and p.grad.any())
        return {name.partition(".")[0] for name in touched}

    _, _, _, real, given, fake = method.model(images, True)
    assert torch.equal(given, fake)
    assert moved(discriminator_loss(real, given)) == {"discriminator"}
    assert moved(adversarial_loss(fake)) == {"tokenizer"}


def test_before_the_start_there_is_no_contest(pair: Path) -> None:
    recipe = vq_recipe(pair, **CONTEST, adversarial_start=3)
    plain: Any = build_method(vq_recipe(pair), 3, "cpu")
    method: Any = build_method(recipe, 3, "cpu")
    batch = first_batch(recipe)
    assert torch.equal(method.loss(batch, 2).loss, plain.loss(batch, 2).loss)  # the tokenizer is drawn first
    assert "discriminator" not in method.loss(batch, 2).metrics
    assert "discriminator" in method.loss(batch, 3).metrics


def test_weight_zero_builds_none(pair: Path) -> None:
    method: Any = build_method(vq_recipe(pair), 3, "cpu")
    assert method.model is method.vq
    assert method.perceptual is None


def test_a_crash_changes_nothing_and_the_file_holds_the_tokenizer_alone(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = vq_recipe(pair, **CONTEST, adversarial_start=1, usage_weight=0.1)
    through = quiet(recipe, tmp_path / "through")
    crash(monkeypatch, recipe, tmp_path / "run", 5)
    run = quiet(recipe, tmp_path / "run", resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)
    with safe_open(run / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tiny.tokenizer().state_dict())
        assert "adversarial_weight" in file.metadata()["recipe"]
    assert load_tokenizer(run / "model.safetensors").codebook_size == 32


@pytest.mark.filterwarnings("ignore:.*pretrained", "ignore:Arguments other than a weight enum")
def test_lpips_by_hand(pair: Path, tmp_path: Path) -> None:
    """AlexNet on 64 pixels, for nothing of it is left at 16."""
    with torch.random.fork_rng():
        package = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = {f"features.{name.split('.', 1)[1]}": tensor for name, tensor in package.net.state_dict().items()}
    torch.save(trunk, tmp_path / "trunk.pth")
    settings = {"perceptual": "lpips-alex", "perceptual_weights": str(tmp_path / "trunk.pth")}
    values = vq_recipe(pair, mse_weight=0, perceptual_weight=2.0, **settings).model_dump()
    values["data"]["image_size"] = 64
    recipe = parse_recipe(values)
    method: Any = build_method(recipe, 3, "cpu")
    batch = first_batch(recipe)
    with torch.no_grad():
        outcome = method.loss(batch, 0)
        images, latents, codes = method.vq(batch.images)
        distance = package(images, batch.images).mean()
    expected = 1.25 * (latents - codes).square().sum(1).mean() + 2 * distance
    torch.testing.assert_close(outcome.loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perceptual_weights": "f"}, "method: perceptual_weights is given but no LPIPS network is used"),
        ({"adversarial_start": 5}, "method: adversarial_start is given but adversarial_weight is 0"),
        ({"discriminator_channels": 12}, "method.discriminator_channels is 12; it must be a multiple of 8"),
    ],
)
def test_settings_that_contradict_each_other(pair: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(VarpiError) as caught:
        vq_recipe(pair, **settings)
    assert str(caught.value) == f"recipe: {message}"


def test_captions_are_no_hindrance(pair: Path, tmp_path: Path) -> None:
    """A tokenizer has no use for them, whole or in micro-batches, in training and in validation."""
    recipe = parse_recipe(
        {
            "method": {"name": "vq_tokenizer"},
            "tokenizer": {"architecture": vars(tiny.TOKENIZER)},
            "data": {"source": "captioned-digits", "image_size": 32},
            "optimizer": {"learning_rate": 3e-3},
            "training": {"steps": 2, "batch_size": 8, "micro_batch": 4},
            "validation": {"every": 2, "images": 8},
        }
    )
    run = quiet(recipe, tmp_path / "run")
    losses = [row["validation_loss"] for row in numbers(run) if "validation_loss" in row]
    assert len(losses) == 1
    assert 0 < losses[0] < 4
