"""The training loop: what a run is, writes and refuses."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from torch._dynamo.utils import counters
from training_runs import contents, crash, numbers, quiet, same, steps_saved, weights

from varpi.errors import VarpiError
from varpi.runtime.processes import World
from varpi.sampling.generate import generate
from varpi.training import read_metrics, train
from varpi.training.compiling import compile_blocks
from varpi.training.loop import _train
from varpi.training.run_directory import RunLock
from varpi.weights import load_generator

# -- what a run is


def test_a_run_and_its_files(pair: Path, tmp_path: Path) -> None:
    run = quiet(tiny.recipe(pair, "training.save_every=2", "training.keep=2"), tmp_path / "run")
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "recipe.yaml",
        "data.json",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
    }
    assert steps_saved(run) == [4, 6]
    assert {path.name for path in (run / "checkpoints" / "step-00000006").iterdir()} == {
        ".metadata",
        "__0_0.distcp",
        "trainer.json",
        "manifest.json",
    }
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert set(rows[0]) >= {
        "loss",
        "reward_mean",
        "reward_std",
        "mse",
        "policy_loss",
        "prior_loss",
        "cross_entropy",
        "ratio_mean",
        "clip_fraction",
        "approx_kl",
        "entropy",
        "gradient_norm",
        "learning_rate",
        "skipped",
        "seconds",
        "seconds_encode",
        "seconds_transformer",
        "seconds_sample",
        "seconds_reward",
        "seconds_loss",
        "seconds_backward",
        "seconds_optimizer",
        "tokens_per_second",
        "peak_memory_gib",
    }
    for row in rows:
        assert row["ratio_mean"] == 1.0
        stages = sum(value for key, value in row.items() if key.startswith("seconds_"))
        assert 0 < stages <= row["seconds"]
        assert row["loss"] == pytest.approx(row["policy_loss"] + 0.1 * row["prior_loss"], rel=1e-5)
    generator = load_generator(run / "model.safetensors")
    assert generator.num_tokens == 16
    with safe_open(run / "model.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "6"
        assert "group_size: 4" in file.metadata()["recipe"]


def test_the_same_recipe_gives_the_same_run(pair: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(pair, "training.steps=3")
    torch.manual_seed(1)
    first = quiet(recipe, tmp_path / "first")
    torch.manual_seed(2)  # the caller's random state does not matter,
    state = torch.get_rng_state()
    second = quiet(recipe, tmp_path / "second")
    assert torch.equal(state, torch.get_rng_state())  # and is left as it was
    assert same(weights(first), weights(second))
    assert numbers(first) == numbers(second)
    other = quiet(tiny.recipe(pair, "training.steps=3", "seed=6"), tmp_path / "other")
    assert not same(weights(first), weights(other))


def test_master_weights_are_fp32_in_a_bf16_run(pair: Path, tmp_path: Path) -> None:
    settings = ("training.steps=3", "generator.dropout=0")
    exact = quiet(tiny.recipe(pair, *settings), tmp_path / "fp32")
    rough = quiet(tiny.recipe(pair, *settings, "training.precision=bf16"), tmp_path / "bf16")
    assert {tensor.dtype for tensor in weights(rough).values()} == {torch.float32}
    assert not same(weights(exact), weights(rough))
    one, other = numbers(exact)[0], numbers(rough)[0]
    assert other["cross_entropy"] == pytest.approx(one["cross_entropy"], rel=0.02)
    assert other["cross_entropy"] != one["cross_entropy"]
    assert [row["ratio_mean"] for row in numbers(rough)] == [1.0, 1.0, 1.0]
    stored = torch.cat([tensor.flatten() for tensor in weights(rough).values()])
    assert (stored != stored.bfloat16().float()).float().mean() > 0.9  # finer than bf16 could hold


def test_gradient_checkpointing_changes_nothing(pair: Path, tmp_path: Path) -> None:
    """With dropout, whose masks the second pass must draw again."""
    plain = quiet(tiny.recipe(pair, "training.steps=3"), tmp_path / "plain")
    spared = quiet(tiny.recipe(pair, "training.steps=3", "training.gradient_checkpointing=true"), tmp_path / "spared")
    for one, other in zip(numbers(plain), numbers(spared), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-5)


def test_compiled_blocks_give_the_same_curve(pair: Path, tmp_path: Path) -> None:
    """With dropout, whose masks are the same."""
    settings = ("training.steps=4", "optimizer.learning_rate=1e-3")
    plain = quiet(tiny.recipe(pair, *settings), tmp_path / "plain")
    counters.clear()
    compiled = quiet(tiny.recipe(pair, *settings, "training.compile=true"), tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] > 0
    for one, other in zip(numbers(plain), numbers(compiled), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(compiled)[name], tensor, atol=1e-4, rtol=1e-3)


def test_what_was_compiled_generates_as_written() -> None:
    plain, compiled = tiny.generator(), tiny.generator()
    compile_blocks(compiled, "cpu")
    counters.clear()
    classes = torch.tensor([0, 1, 2])
    assert torch.equal(generate(compiled, classes, seed=0), generate(plain, classes, seed=0))
    assert not counters["stats"]["unique_graphs"]


def test_without_a_compiler_nothing_begins(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VarpiError, match=r"training\.compile needs a C\+\+ compiler"):
        quiet(tiny.recipe(pair, "training.compile=true"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_accumulation_changes_nothing(pair: Path, tmp_path: Path) -> None:
    settings = ("generator.dropout=0", "training.steps=4", "optimizer.learning_rate=1e-3")
    whole = quiet(tiny.recipe(pair, *settings), tmp_path / "whole")
    parts = quiet(tiny.recipe(pair, *settings, "training.micro_batch=3"), tmp_path / "parts")
    for one, other in zip(numbers(whole), numbers(parts), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["reward_mean"] == pytest.approx(one["reward_mean"], rel=1e-6)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, atol=1e-4, rtol=1e-4)


def test_tensorboard_holds_what_the_log_holds(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = tiny.recipe(pair, "training.steps=4", "training.save_every=2", "logging.tensorboard=true")
    run = tmp_path / "run"
    crash(monkeypatch, recipe, run, 3)
    quiet(recipe, run, resume=True)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4]
    for event, row in zip(scalars, read_metrics(run), strict=True):
        assert event.value == pytest.approx(row["loss"], rel=1e-6)


def test_a_run_of_wandb_has_an_id_of_its_own(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept by a resume, and no other run's, whatever its directory is called."""
    begun: list[dict[str, Any]] = []

    def init(**asked: Any) -> Any:
        begun.append(asked)
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init = init  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    recipe = tiny.recipe(pair, "training.steps=4", "training.save_every=2", "logging.wandb=mine")
    crash(monkeypatch, recipe, tmp_path / "one" / "run", 3)
    quiet(recipe, tmp_path / "one" / "run", resume=True)
    quiet(recipe, tmp_path / "two" / "run")
    assert {(one["project"], one["name"]) for one in begun} == {("mine", "run")}
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]


# -- what is refused, and leaves everything as it was


def test_a_directory_that_holds_another_run(pair: Path, tmp_path: Path) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=1"), tmp_path / "run")
    before = contents(run)
    with pytest.raises(VarpiError, match=r"already holds a run \(at step-00000001\); continue it with --resume or"):
        quiet(tiny.recipe(pair, "training.steps=1"), run)
    assert contents(run) == before


def test_a_directory_that_holds_something_else(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(VarpiError, match="is not empty and holds no run; choose another --output"):
            quiet(tiny.recipe(pair), tmp_path, resume=resume)
    with pytest.raises(VarpiError, match="is a file; choose another --output"):
        quiet(tiny.recipe(pair), tmp_path / "thesis.tex")
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("optimizer.learning_rate=0.01", "optimizer.learning_rate is 0.003 there and 0.01 here"),
        ("method.reward.mse_weight=2", "method.reward.mse_weight is 1.0 there and 2.0 here"),
        ("seed=6", "seed is 5 there and 6 here"),
        ("validation.every=1", "validation"),
    ],
)
def test_resume_under_another_recipe(pair: Path, tmp_path: Path, setting: str, line: str) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=1"), tmp_path / "run")
    before = contents(run)
    with pytest.raises(VarpiError) as caught:
        quiet(tiny.recipe(pair, "training.steps=1", setting), run, resume=True)
    assert f"{run} is a run of another recipe: {line}" in str(caught.value)
    assert contents(run) == before


def test_steps_may_not_change_under_a_cosine(pair: Path, tmp_path: Path) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=1", "optimizer.schedule=cosine"), tmp_path / "run")
    with pytest.raises(VarpiError, match=r"training\.steps is 1 there and 2 here"):
        quiet(tiny.recipe(pair, "training.steps=2", "optimizer.schedule=cosine"), run, resume=True)


def test_steps_may_not_change_under_noise_that_changes_with_them(pair: Path, tmp_path: Path) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=1", "method.context_noise_end=0.5"), tmp_path / "run")
    with pytest.raises(VarpiError, match=r"training\.steps is 1 there and 2 here"):
        quiet(tiny.recipe(pair, "training.steps=2", "method.context_noise_end=0.5"), run, resume=True)


def test_what_changes_no_number_may_change(pair: Path, tmp_path: Path) -> None:
    through = quiet(tiny.recipe(pair, "training.steps=4"), tmp_path / "through")
    run = quiet(tiny.recipe(pair, "training.steps=2"), tmp_path / "run")
    settings = ("data.workers=1", "training.save_every=1", "training.keep=1", "training.max_skipped=9")
    quiet(tiny.recipe(pair, "training.steps=4", *settings), run, resume=True)
    assert same(weights(run), weights(through))
    assert steps_saved(run) == [4]


def test_resume_on_other_data(pair: Path, tmp_path: Path) -> None:
    images = tiny.images(tmp_path / "images")
    run = quiet(tiny.recipe(pair, f"data.source={images}", "training.steps=1"), tmp_path / "run")
    (images / "a" / "0.png").rename(images / "a" / "zero.png")
    with pytest.raises(VarpiError, match="was trained on other data than the source now holds"):
        quiet(tiny.recipe(pair, f"data.source={images}", "training.steps=2"), run, resume=True)


def test_a_batch_that_does_not_divide(pair: Path, tmp_path: Path) -> None:
    recipe, run = tiny.recipe(pair, "training.batch_size=7"), tmp_path / "run"
    with pytest.raises(VarpiError, match=r"training\.batch_size is 7; it must be a multiple of 2 processes"):
        _train(recipe, run, World(0, 2, "cpu"), RunLock(run), False, False)
    assert not run.exists()


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:1", ""])
def test_a_device_that_is_not_there(pair: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(VarpiError, match=r"^device "):
        train(tiny.recipe(pair), tmp_path / "run", device=device, show=False)
    assert not (tmp_path / "run").exists()
