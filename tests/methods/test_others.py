"""The plain methods: next-token training, the tokenizer, the classifiers; and what does not fit together is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

from varpi.data import Batches, open_dataset
from varpi.errors import VarpiError
from varpi.generators import LlamaGenConfig
from varpi.methods import Method, build_method
from varpi.methods.classifier import shifted
from varpi.networks.convnet import SmallConvNet, load_classifier
from varpi.recipe import Recipe, load_recipe, parse_recipe
from varpi.runtime.processes import World
from varpi.runtime.randomness import Stream, uniforms
from varpi.tokenizers import VQConfig
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress
from varpi.weights import load_tokenizer, save_generator, save_tokenizer
from varpi.weights.pair import load_pair, open_generator


def batches(recipe: Recipe) -> Batches:
    dataset = open_dataset(recipe.data.source, image_size=recipe.data.image_size)
    return Batches(dataset, batch_size=recipe.training.batch_size, seed=recipe.seed)


def build(recipe: Recipe) -> Method:
    return build_method(recipe, open_dataset(recipe.data.source, image_size=recipe.data.image_size).num_classes, "cpu")


def losses(recipe: Recipe, method: Method, steps: int) -> list[dict[str, float]]:
    """The metrics of `steps` updates, on the run's first batch again and again."""
    trainer = Trainer(recipe, method, make_optimizer(method.model, recipe.optimizer), World(0, 1, "cpu"))
    progress = Progress()
    batch = batches(recipe).at(0)
    return [next(trainer.updates(batch, number, progress)) for number in range(steps)]


# -- next_token


def test_next_token_is_cross_entropy_by_hand(pair: Path) -> None:
    recipe = tiny.recipe(pair, "generator.dropout=0", "method.condition_drop=0.5", method="next_token")
    method: Any = build(recipe)
    batch = batches(recipe).at(2)
    targets = method.tokenizer.encode(batch.images)
    drop = uniforms(recipe.seed, 2, batch.positions, (), stream=Stream.CONDITION_DROP) < 0.5
    assert 0 < drop.sum() < 8
    condition = torch.where(drop, tiny.GENERATOR.num_classes, batch.condition)
    with torch.no_grad():
        outcome = method.loss(batch, 2)
        expected = F.cross_entropy(method.model.logits(targets, condition).flatten(0, 1), targets.flatten())
        undropped = F.cross_entropy(method.model.logits(targets, batch.condition).flatten(0, 1), targets.flatten())
        held_out = method.validation_loss(batch)
    torch.testing.assert_close(outcome.loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(held_out, undropped, atol=1e-6, rtol=1e-6)
    assert abs(expected - undropped) > 1e-3


def test_next_token_validates_without_dropout(pair: Path) -> None:
    """After a step in train mode, too."""
    recipe = tiny.recipe(pair, "generator.dropout=0.5", method="next_token")
    method: Any = build(recipe)
    batch = batches(recipe).at(0)
    with torch.no_grad():
        method.loss(batch, 0)
        assert method.model.training
        held_out = method.validation_loss(batch)
        targets = method.tokenizer.encode(batch.images)
        expected = F.cross_entropy(tiny.generator().logits(targets, batch.condition).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(held_out, expected, atol=1e-5, rtol=0)


def test_the_control_drops_the_same_conditions(pair: Path) -> None:
    """VA-π and its control see the same images with the same conditions in every step."""
    recipes = [tiny.recipe(pair, "method.condition_drop=0.5", method=name) for name in ("va_pi", "next_token")]
    seen = []
    for recipe in recipes:
        method: Any = build(recipe)
        drop = method.model.drop_condition

        def spy(condition: torch.Tensor, where: torch.Tensor, drop: Any = drop) -> torch.Tensor:
            seen.append(drop(condition, where))
            return seen[-1]

        method.model.drop_condition = spy
        method.loss(batches(recipe).at(1), 1)
    assert torch.equal(*seen)


def test_next_token_learns(pair: Path) -> None:
    recipe = tiny.recipe(pair, "training.steps=30", method="next_token")
    rows = losses(recipe, build(recipe), 30)
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] - 1
    assert rows[0]["loss"] == rows[0]["cross_entropy"]


# -- vq_tokenizer


def vq_recipe(pair: Path, **method: Any) -> Recipe:
    architecture = {
        "downsample": 4,
        "channels": 8,
        "channel_multipliers": [1, 1, 1],
        "latent_channels": 8,
        "codebook_size": 32,
        "codebook_dim": 4,
        "norm_groups": 4,
        "encoder_blocks": 1,
        "decoder_blocks": 1,
    }
    return parse_recipe(
        {
            "method": {"name": "vq_tokenizer", **method},
            "tokenizer": {"architecture": architecture},
            "data": {"source": str(pair / "images"), "image_size": 16},
            "optimizer": {"learning_rate": 3e-3},
            "training": {"steps": 40, "batch_size": 8},
        }
    )


def test_vq_tokenizer_learns(pair: Path) -> None:
    recipe = vq_recipe(pair, usage_weight=0.1)
    method: Any = build(recipe)
    batch = batches(recipe).at(0)
    with torch.no_grad():
        before = method.validation_loss(batch)
    rows = losses(recipe, method, 40)
    with torch.no_grad():
        after = method.validation_loss(batch)
    assert rows[-1]["mse"] < 0.7 * rows[0]["mse"]
    assert rows[-1]["usage"] < rows[0]["usage"]
    assert after < 0.8 * before


def test_vq_tokenizer_loss_by_hand(pair: Path) -> None:
    recipe = vq_recipe(pair, mse_weight=2.0, commitment_weight=0.5)
    method: Any = build(recipe)
    batch = batches(recipe).at(0)
    with torch.no_grad():
        outcome = method.loss(batch, 0)
        images, latents, codes = method.model(batch.images)
    distance = (latents - codes).square().sum(1).mean()
    expected = 2 * F.mse_loss(images, batch.images) + 1.5 * distance
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(latents.norm(dim=1), torch.ones(8, 4, 4))
    assert "usage" not in outcome.metrics


def test_vq_tokenizer_refuses_an_image_size(pair: Path) -> None:
    values = vq_recipe(pair).model_dump()
    values["data"]["image_size"] = 18
    with pytest.raises(VarpiError, match=r"data\.image_size is 18; this tokenizer needs a multiple of 4"):
        build(parse_recipe(values))


def test_vq_tokenizer_saves_what_loads(pair: Path, tmp_path: Path) -> None:
    method: Any = build(vq_recipe(pair))
    method.save(tmp_path / "t.safetensors", method.model.state_dict(), {"step": "3"})
    loaded = load_tokenizer(tmp_path / "t.safetensors")
    assert loaded.codebook_size == 32
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.encode(images), method.model.encode(images))


# -- classifier


def classifier_recipe(pair: Path, num_classes: int = 3, **more: Any) -> Recipe:
    return parse_recipe(
        {
            "method": {"name": "classifier", "channels": [8, 16], "num_classes": num_classes, **more},
            "data": {"source": str(pair / "images"), "image_size": 16},
            "optimizer": {"learning_rate": 1e-2},
            "training": {"steps": 40, "batch_size": 8},
        }
    )


def test_classifier_learns(pair: Path, tmp_path: Path) -> None:
    recipe = classifier_recipe(pair)
    method: Any = build(recipe)
    rows = losses(recipe, method, 40)
    assert rows[-1]["cross_entropy"] < 0.5 * rows[0]["cross_entropy"]
    assert rows[-1]["accuracy"] == 1.0
    method.save(tmp_path / "c.safetensors", method.model.state_dict(), {})
    loaded = load_classifier(tmp_path / "c.safetensors")
    assert isinstance(loaded, SmallConvNet)
    images = batches(recipe).at(0).images
    with torch.no_grad():
        assert torch.equal(loaded.logits(images), method.model.logits(images))


def test_images_are_shifted_and_their_edges_repeated() -> None:
    image = torch.tensor([[[1.0, 2, 3], [4, 5, 6]]])
    moved = shifted(torch.stack([image, image]), torch.tensor([[1, 0], [0, -2]]))
    assert moved.tolist() == [[[[1, 2, 3], [1, 2, 3]]], [[[3, 3, 3], [6, 6, 6]]]]


def test_a_classifier_sees_every_image_at_its_own_place(pair: Path) -> None:
    """Drawn by seed, step and position: halves of a batch are the whole; validation moves nothing."""
    method: Any = build(classifier_recipe(pair, shift=3, residual=True))
    batch = batches(classifier_recipe(pair)).at(0)
    seen: list[torch.Tensor] = []
    method.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    halves = [
        dataclasses.replace(batch, images=batch.images[i], condition=batch.condition[i], positions=batch.positions[i])
        for i in (slice(0, 4), slice(4, 8))
    ]
    for part, step in [(batch, 5), *((half, 5) for half in halves), (batch, 6)]:
        method.loss(part, step)
    method.validation_loss(batch)
    whole, first, second, later, held_out = seen
    assert torch.equal(whole, torch.cat([first, second]))
    assert not torch.equal(whole, later)
    assert torch.equal(held_out, batch.images)
    draws = (uniforms(0, 5, batch.positions, (2,), stream=Stream.SHIFT) * 7).long() - 3
    assert draws.unique().numel() > 3
    assert torch.equal(whole, shifted(batch.images, draws))


def test_batch_normalization_takes_whole_batches(pair: Path) -> None:
    method: Any = build(classifier_recipe(pair, norm="batch"))
    method.loss(batches(classifier_recipe(pair)).at(0), 0)
    assert method.model.state_dict()["stages.0.1.running_mean"].abs().sum() > 0
    values = classifier_recipe(pair, norm="batch").model_dump(mode="json")
    values["training"]["micro_batch"] = 4
    with pytest.raises(VarpiError, match=r"training\.micro_batch is 4; leave it out with method\.norm batch"):
        parse_recipe(values)
    values["training"] |= {"micro_batch": None, "ema": 0.9}
    with pytest.raises(VarpiError, match=r"training\.ema averages weights, not what method\.norm batch counts"):
        parse_recipe(values)


@pytest.mark.parametrize("name", ["classifier", "detector"])
def test_more_stages_than_an_image_has_halves(name: str) -> None:
    recipe = {"classifier": "digits-judge", "detector": "shapes-detector"}[name]
    load_recipe(recipe, ["method.channels=[8, 8, 8, 8, 8, 8]"])
    with pytest.raises(VarpiError, match=r"method\.channels names 7 stages, .* an image of 32 pixels has too few"):
        load_recipe(recipe, ["method.channels=[8, 8, 8, 8, 8, 8, 8]"])


@pytest.mark.parametrize("recipe", ["digits-tokenizer", "digits-judge", "shapes-detector"])
@pytest.mark.parametrize("name", ["gradient_checkpointing", "compile"])
def test_what_is_for_generators_alone(recipe: str, name: str) -> None:
    with pytest.raises(VarpiError, match=rf"training\.{name} is for generators; method \w+ trains none"):
        load_recipe(recipe, [f"training.{name}=true"])


def test_classifier_refuses_more_classes_than_it_has(pair: Path) -> None:
    with pytest.raises(VarpiError, match=r"method\.num_classes is 2, but the data has 3"):
        build(classifier_recipe(pair, num_classes=2))


# -- what a pair must fit


def refuse_pair(recipe: Recipe) -> str:
    dataset = open_dataset(recipe.data.source, image_size=recipe.data.image_size)
    with pytest.raises(VarpiError) as caught:
        load_pair(recipe, dataset.num_classes, "cpu")
    return str(caught.value)


def test_pair_of_different_vocabularies(pair: Path, tmp_path: Path) -> None:
    config = VQConfig(**{**vars(tiny.TOKENIZER), "codebook_size": 16})
    save_tokenizer(tiny.tokenizer(config), tmp_path / "t.safetensors")
    message = refuse_pair(tiny.recipe(pair, f"tokenizer.source={tmp_path / 't.safetensors'}"))
    assert message == (
        "generator and tokenizer do not belong together: the generator's vocabulary has 32 tokens, the tokenizer's "
        "codebook 16"
    )


def test_pair_of_another_image_size(pair: Path) -> None:
    message = refuse_pair(tiny.recipe(pair, "data.image_size=32"))  # what it would be with an 8-fold tokenizer
    assert message == (
        "data.image_size is 32, but a 4x4 grid of tokens decodes to 16 pixels with this tokenizer (down-sampling 4)"
    )


@pytest.mark.parametrize(("known", "fits"), [(2, False), (3, True), (4, True)])
def test_pair_that_knows_too_few_classes(pair: Path, tmp_path: Path, known: int, fits: bool) -> None:
    """Not even by one: the class after the last is the null class, which no image may have."""
    config = LlamaGenConfig(**{**vars(tiny.GENERATOR), "num_classes": known})
    save_generator(tiny.generator(config), tmp_path / "g.safetensors")
    recipe = tiny.recipe(pair, f"generator.source={tmp_path / 'g.safetensors'}")
    if fits:
        load_pair(recipe, open_dataset(recipe.data.source, image_size=16).num_classes, "cpu")
    else:
        assert refuse_pair(recipe) == "data.source has 3 classes, but the generator knows 2 classes"


def test_pair_conditioned_on_text_needs_text(pair: Path, tmp_path: Path) -> None:
    text = {"conditioning": "text", "condition_tokens": 3, "caption_dim": 8, "num_classes": 1000}
    save_generator(tiny.generator(LlamaGenConfig(**{**vars(tiny.GENERATOR), **text})), tmp_path / "g.safetensors")
    message = refuse_pair(tiny.recipe(pair, f"generator.source={tmp_path / 'g.safetensors'}"))
    assert message.startswith("the generator is conditioned on text, but data.source gives classes; set data.caption_c")


def test_pair_conditioned_on_classes_needs_classes(pair: Path) -> None:
    with pytest.raises(VarpiError, match=r"data\.source has captions, but the generator knows 3 classes"):
        load_pair(tiny.recipe(pair), None, "cpu")


def test_pair_is_ready_to_train(pair: Path) -> None:
    recipe = tiny.recipe(pair, "generator.dropout=0.25", "training.gradient_checkpointing=true")
    loaded = load_pair(recipe, open_dataset(recipe.data.source, image_size=16).num_classes, "cpu")
    generator: Any = loaded.generator
    tokenizer = loaded.tokenizer
    assert all(p.requires_grad for p in generator.parameters())
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert generator.gradient_checkpointing
    assert generator.dropout.p == generator.blocks[1].dropout.p == 0.25


@pytest.mark.parametrize(
    ("architecture", "line"),
    [
        (
            {"dim": 8, "n_layer": 1},
            "generator.architecture is not valid: missing 1 required positional argument: 'n_head'",
        ),
        (
            {"dim": 8, "layers": 1},
            "generator.architecture has fields that this varpi does not know: layers; it knows dim, n_layer",
        ),
        (
            {"dim": 10, "n_layer": 1, "n_head": 4},
            "generator.architecture is not valid: LlamaGenConfig: dim 10 over 4 heads must give",
        ),
        ("llamagen-c2i-b", "generator.architecture must list the fields of LlamaGenConfig to start afresh"),
    ],
)
def test_wrong_architectures(pair: Path, architecture: Any, line: str) -> None:
    recipe = tiny.recipe(pair, method="next_token")
    assert recipe.generator is not None
    section = recipe.generator.model_copy(update={"source": None, "architecture": architecture})
    changed = recipe.model_copy(update={"generator": section})
    with pytest.raises(VarpiError) as caught:
        open_generator(changed, "cpu")
    assert str(caught.value).startswith(line)
