"""Post-training of the tokenizer's decoder: its loss by a plain graph, what moves, and what becomes of the run."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from training_runs import quiet, same, weights

from varpi import objective
from varpi.data import Batch, Batches, open_dataset
from varpi.errors import VarpiError
from varpi.methods import build_method, teacher_forcing
from varpi.methods.tokenizer_decoder import TokenizerDecoder
from varpi.recipe import Recipe
from varpi.report.run import report_run
from varpi.runtime.processes import World
from varpi.runtime.randomness import Stream
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress
from varpi.training.validation import prepare_condition
from varpi.weights import load_generator, load_tokenizer
from varpi.weights.pair import open_pair

TRAINED = ("post_quant_conv.", "decoder.")


def recipe(pair: Path, *settings: str) -> Recipe:
    return tiny.recipe(pair, *settings, method="tokenizer_decoder")


def build(recipe: Recipe) -> Any:
    return build_method(recipe, 3, "cpu")


def batch_of(recipe: Recipe, number: int = 0) -> Batch:
    dataset = open_dataset(recipe.data.source, image_size=recipe.data.image_size)
    return Batches(dataset, batch_size=recipe.training.batch_size, seed=recipe.seed).at(number)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_loss_and_its_gradient_by_a_plain_graph(pair: Path, noise: float) -> None:
    """Samples of the frozen generator in the (noisy) true context, decoded, against their images."""
    asked = recipe(pair, f"method.context_noise={noise}", "method.reward.l1_weight=0.5", "generator.dropout=0.5")
    method, batch = build(asked), batch_of(asked, 3)
    tokenizer = load_tokenizer(pair / "tokenizer.safetensors")
    generator = load_generator(pair / "generator.safetensors")
    targets = tokenizer.encode(batch.images)
    draws = method.uniforms(batch, 3, (16, 2), Stream.CONTEXT_NOISE)
    context = objective.corrupt(targets, noise, 32, uniforms=draws)
    logits = generator.logits(context, batch.condition)
    draws = method.uniforms(batch, 3, (1, 16), Stream.SAMPLES)
    samples = objective.sample_tokens(logits, 1, uniforms=draws)[:, 0]
    assert not torch.equal(samples, targets)
    decoded = tokenizer.decode(samples)
    expected = F.mse_loss(decoded, batch.images) + 0.5 * F.l1_loss(decoded, batch.images)
    expected.backward()
    outcome = method.loss(batch, 3)
    outcome.loss.backward()
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(outcome.metrics["mse"], F.mse_loss(decoded, batch.images))
    for (name, found), plain in zip(method.model.named_parameters(), tokenizer.parameters(), strict=True):
        if name.startswith(TRAINED):
            torch.testing.assert_close(found.grad, plain.grad, msg=name)
        else:
            assert found.grad is None, name
    assert all(p.grad is None for p in method.generator.parameters())


def test_the_perceptual_distance_counts(pair: Path) -> None:
    settings = ("method.reward.perceptual=digits", "method.reward.perceptual_weight=2")
    asked = recipe(pair, "method.reward.mse_weight=0", *settings)
    outcome = build(asked).loss(batch_of(asked), 0)
    assert set(outcome.metrics) == {"perceptual"}
    assert outcome.metrics["perceptual"] > 0
    torch.testing.assert_close(outcome.loss.detach(), 2 * outcome.metrics["perceptual"])


def test_the_decoder_learns_to_read_the_generator(pair: Path) -> None:
    asked = recipe(pair)
    method, batch = build(asked), batch_of(asked)
    trainer = Trainer(asked, method, make_optimizer(method.model, asked.optimizer), World(0, 1, "cpu"))
    before = method.validation_loss(batch).item()
    assert before == method.validation_loss(batch).item()
    progress = Progress()
    for _ in range(20):
        next(trainer.updates(batch, 0, progress))
    assert method.validation_loss(batch).item() < 0.8 * before


def test_a_run_resumes_and_is_a_pair(pair: Path, tmp_path: Path) -> None:
    asked = recipe(pair, "training.steps=4", "training.save_every=2", "method.context_noise=0.3", "validation.every=2")
    whole = quiet(asked, tmp_path / "whole")
    half = asked.model_copy(update={"training": asked.training.model_copy(update={"steps": 2})})
    quiet(half, tmp_path / "parts")
    assert same(weights(quiet(asked, tmp_path / "parts", resume=True)), weights(whole))

    before, after = load_tokenizer(pair / "tokenizer.safetensors"), load_tokenizer(whole)
    assert after.downsample == before.downsample
    moved = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])}
    assert moved == {name for name, _ in before.named_parameters() if name.startswith(TRAINED)}

    opened = open_pair(whole)
    assert same(opened.generator.state_dict(), load_generator(pair / "generator.safetensors").state_dict())
    assert same(opened.tokenizer.state_dict(), after.state_dict())
    chosen = open_pair(whole, tokenizer=str(pair / "tokenizer.safetensors"))
    assert same(chosen.tokenizer.state_dict(), before.state_dict())


def test_its_page_shows_the_tokenizer_before(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = quiet(recipe(pair, "training.steps=1"), tmp_path / "run")
    drawn: dict[str, Any] = {}

    def draw(caption: str, generator: Any, tokenizer: Any, *_: Any, **__: Any) -> None:
        drawn[caption] = tokenizer.state_dict()

    monkeypatch.setattr("varpi.report.run.draw_samples", draw)
    monkeypatch.setattr("varpi.report.run.write_page", lambda *_: None)
    monkeypatch.setattr("varpi.report.run.before_after", lambda *_: None)
    report_run(run, each=1, device="cpu")
    assert same(drawn["before"], load_tokenizer(pair / "tokenizer.safetensors").state_dict())
    assert same(drawn["after"], load_tokenizer(run).state_dict())


def test_conditions_are_the_frozen_generators(pair: Path) -> None:
    method = build(recipe(pair))
    assert torch.equal(prepare_condition(method, [0, 2], "cpu"), torch.tensor([0, 2]))
    with pytest.raises(VarpiError):
        prepare_condition(method, ["a caption"], "cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("lora.rank=2",), "lora adapts generators; method tokenizer_decoder leaves the generator as it is"),
        (("training.gradient_checkpointing=true",), "training.gradient_checkpointing is for generators"),
        (("method.reward.mse_weight=0",), "method.reward: every weight is 0"),
    ],
)
def test_contradictions_are_refused(pair: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        recipe(pair, *settings)


def test_a_tokenizer_of_another_family_is_refused(pair: Path) -> None:
    shared = teacher_forcing.parts(recipe(pair), 3, "cpu")

    class Other(torch.nn.Module):
        codebook_size = 32

    shared["tokenizer"] = Other()
    with pytest.raises(VarpiError, match=r"tokenizer\.source: is a Other; method tokenizer_decoder trains a VQ's"):
        TokenizerDecoder(**shared)
