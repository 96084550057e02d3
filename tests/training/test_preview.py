"""Previews and held-out rewards: what they show, that training does not notice them, and the page that shows them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from launch import several
from PIL import Image
from training_runs import contents, crash, numbers, quiet, same, weights

from varpi.cli.main import main
from varpi.data.opening import open_split
from varpi.data.pixels import to_uint8
from varpi.errors import VarpiError
from varpi.generators import LlamaGen
from varpi.methods import build_method
from varpi.report.live import render_live, write_live
from varpi.sampling.generate import generate
from varpi.training import read_metrics
from varpi.training.state import Progress
from varpi.training.validation import as_batch
from varpi.weights import load_tokenizer

PREVIEW = ("preview.every=2", "preview.images=3")
SIDE = tiny.IMAGE_SIZE


def tiles(path: Path) -> np.ndarray:
    """(rows, columns, H, W, 3) of a preview."""
    picture = np.asarray(Image.open(path))
    step = SIDE + 2
    rows, columns = (picture.shape[0] + 2) // step, (picture.shape[1] + 2) // step
    return np.array(
        [[picture[r * step : r * step + SIDE, c * step : c * step + SIDE] for c in range(columns)] for r in range(rows)]
    )


def test_what_a_preview_shows(pair: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(pair, *PREVIEW, "preview.guidance_scale=2")
    run = quiet(recipe, tmp_path / "run")
    found = sorted((run / "previews").iterdir())
    assert [path.name for path in found] == [f"step-{step:08d}.png" for step in (0, 2, 4, 6)]
    first, last = tiles(found[0]), tiles(found[-1])
    assert first.shape == (4, 3, SIDE, SIDE, 3)

    held_out = open_split(recipe.data, "validation")
    items = [held_out[index] for index in (0, 2, 4)]  # of six, spread evenly
    images = torch.stack([item.image for item in items])
    assert np.array_equal(first[0], to_uint8(images))
    tokenizer = load_tokenizer(pair / "tokenizer.safetensors")
    assert np.array_equal(first[1], to_uint8(tokenizer.decode(tokenizer.encode(images))))
    classes = [item.condition for item in items]
    free = generate(tiny.generator(), classes, guidance_scale=2, seed=recipe.seed)
    assert np.array_equal(first[3], to_uint8(tokenizer.decode(free)))

    assert np.array_equal(first[:2], last[:2])
    assert not np.array_equal(first[2], last[2])
    assert not np.array_equal(first[3], last[3])
    told = [row for row in numbers(run) if "preview_reward" in row]
    assert [row["step"] for row in told] == [0, 2, 4, 6]
    assert len({row["preview_reward"] for row in told}) == 4


def test_training_does_not_notice(pair: Path, tmp_path: Path) -> None:
    plain = quiet(tiny.recipe(pair), tmp_path / "plain")
    seen = quiet(tiny.recipe(pair, *PREVIEW, "validation.every=6"), tmp_path / "seen")
    assert [row for row in numbers(seen) if "loss" in row] == numbers(plain)
    assert same(weights(seen), weights(plain))
    (held_out,) = [row for row in numbers(seen) if "validation_loss" in row]
    assert held_out["validation_reward"] < 0 < held_out["validation_loss"]


@pytest.mark.parametrize("step", [1, 5])
def test_a_crash_changes_nothing(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    recipe = tiny.recipe(pair, *PREVIEW, "training.save_every=2", "validation.every=3", "validation.best_by=reward")
    whole = quiet(recipe, tmp_path / "whole")
    crash(monkeypatch, recipe, tmp_path / "cut", step)
    resumed = quiet(recipe, tmp_path / "cut", resume=True)
    assert numbers(whole) == numbers(resumed)
    assert same(weights(whole), weights(resumed))
    assert contents(whole / "previews") == contents(resumed / "previews")


@pytest.mark.parametrize("method", ["next_token", "ste", "ar_grpo", "tokenizer_decoder"])
def test_other_methods(pair: Path, tmp_path: Path, method: str) -> None:
    run = quiet(tiny.recipe(pair, *PREVIEW, "training.steps=2", method=method), tmp_path / "run")
    assert tiles(run / "previews/step-00000002.png").shape[0] == 4
    assert ("preview_reward" in read_metrics(run)[-1]) == (method == "ste")


def test_the_average_is_what_is_shown(pair: Path, tmp_path: Path) -> None:
    """One that hardly moves: after the last step the pictures are those from before the first."""
    run = quiet(tiny.recipe(pair, *PREVIEW, "training.ema=0.9999999"), tmp_path / "run")
    assert np.array_equal(*(tiles(run / f"previews/step-{step:08d}.png") for step in (0, 6)))


def test_two_processes_show_what_one_shows(pair: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(pair, *PREVIEW, "validation.every=2", "training.steps=2")
    one = quiet(recipe, tmp_path / "one")
    given = [part for setting in (*PREVIEW, "validation.every=2", "training.steps=2") for part in ("--set", setting)]
    several(2, ["train", pair / "va_pi.yaml", "--output", tmp_path / "two", *given])
    name = "previews/step-00000000.png"
    assert np.array_equal(tiles(one / name), tiles(tmp_path / "two" / name))
    first = [next(row for row in numbers(run) if "preview_reward" in row) for run in (one, tmp_path / "two")]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert (tmp_path / "two/live.html").is_file()


# -- held-out rewards


def test_the_held_out_reward_by_hand(pair: Path) -> None:
    """Of one sample an image, drawn under context noise, whatever the batches: minus its mean squared error."""
    recipe = tiny.recipe(pair, "method.context_noise=0")
    method: Any = build_method(recipe, 3, "cpu")
    data = open_split(recipe.data, "validation")
    whole = float(method.validation_reward(as_batch(method, {i: data[i] for i in range(6)}, "cpu")))
    halves = [method.validation_reward(as_batch(method, {i: data[i] for i in part}, "cpu")) for part in ((0, 4), (5,))]
    rest = [method.validation_reward(as_batch(method, {i: data[i] for i in (1, 2, 3)}, "cpu"))]
    assert whole == pytest.approx(float(2 * halves[0] + halves[1] + 3 * rest[0]) / 6, rel=1e-5)

    def certain(self: LlamaGen, tokens: torch.Tensor, condition: Any) -> torch.Tensor:
        return 1e4 * torch.nn.functional.one_hot(tokens, 32).float()  # draws the true tokens

    images = torch.stack([data[i].image for i in range(6)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaGen, "logits", certain)
        best = float(method.validation_reward(as_batch(method, {i: data[i] for i in range(6)}, "cpu")))
    decoded = method.tokenizer.decode(method.tokenizer.encode(images))
    assert best == pytest.approx(-float((decoded - images).square().mean()), rel=1e-5)
    noisy: Any = build_method(tiny.recipe(pair, "method.context_noise=0.9"), 3, "cpu")
    assert float(noisy.validation_reward(as_batch(noisy, {i: data[i] for i in range(6)}, "cpu"))) != whole


@pytest.mark.parametrize("best_by", ["loss", "reward"])
def test_the_best_weights_are_kept_by_either(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best_by: str
) -> None:
    from varpi.training.validation import Validator

    found = iter([{"loss": 2.0, "reward": -1.0}, {"loss": 1.0, "reward": -2.0}, {"loss": 3.0, "reward": -3.0}])
    monkeypatch.setattr(Validator, "measure", lambda self, method: next(found))
    progress: list[Progress] = []
    note = Validator.note
    monkeypatch.setattr(Validator, "note", lambda self, at, said: (progress.append(at), note(self, at, said))[1])
    run = quiet(tiny.recipe(pair, "validation.every=2", f"validation.best_by={best_by}"), tmp_path / "run")
    assert progress[-1].best_step == {"loss": 4, "reward": 2}[best_by]
    assert [row["validation_reward"] for row in read_metrics(run) if "validation_reward" in row] == [-1, -2, -3]


def test_a_run_that_only_watches_gives_back_its_last_weights(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the first of its validations was the best; and it is the run that validates nothing."""
    from varpi.training.validation import Validator

    watching = tiny.recipe(pair, "validation.every=2", "validation.best_by=null")
    found = iter([{"loss": float(i), "reward": -float(i)} for i in range(3)])
    note, best = Validator.note, list[bool]()
    with monkeypatch.context() as patch:
        patch.setattr(Validator, "measure", lambda self, method: next(found))
        patch.setattr(Validator, "note", lambda self, at, said: (best.append(note(self, at, said)), best[-1])[1])
        seen = quiet(watching, tmp_path / "seen")
    assert best == [False] * 3  # nothing is written for them
    assert same(weights(seen), weights(quiet(tiny.recipe(pair), tmp_path / "plain")))
    assert [row["validation_loss"] for row in read_metrics(seen) if "validation_loss" in row] == [0, 1, 2]
    before = (seen / "model.safetensors").stat().st_mtime_ns
    quiet(watching, seen, resume=True)
    assert (seen / "model.safetensors").stat().st_mtime_ns == before  # it was finished


def test_some_held_out_images_are_some_of_everywhere(pair: Path, tmp_path: Path) -> None:
    """Of six those numbered 0, 2 and 4."""
    run = quiet(tiny.recipe(pair, "validation.every=6", "validation.images=3"), tmp_path / "run")
    last = next(row for row in read_metrics(run) if "validation_reward" in row)
    method: Any = build_method(tiny.recipe(pair, f"generator.source={run / 'model.safetensors'}"), 3, "cpu")
    data = open_split(tiny.recipe(pair).data, "validation")
    some = as_batch(method, {i: data[i] for i in (0, 2, 4)}, "cpu")
    with torch.no_grad():
        found = {"validation_loss": method.validation_loss(some), "validation_reward": method.validation_reward(some)}
    assert {name: last[name] for name in found} == pytest.approx(
        {name: float(value) for name, value in found.items()}, rel=1e-5
    )


def test_without_a_split_to_validate_on_it_says_how_to_go_without(pair: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(pair, "validation.every=2", "validation.split=test")
    with pytest.raises(VarpiError, match=r"validation: .*no split 'test'.*--set validation=null"):
        quiet(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "method", "line"),
    [
        (["validation.every=1", "validation.best_by=reward"], "next_token", "best_by is reward, but method next_token"),
        (["validation.every=1", "validation.patience=2", "validation.best_by=null"], "va_pi", "set best_by to loss or"),
        (["preview.every=3", "training.updates_per_batch=2"], "va_pi", "preview.every is 3; it must be a multiple"),
        (["preview.every=1", "preview.images=65"], "va_pi", "preview.images is 65"),
    ],
)
def test_contradictions(pair: Path, settings: list[str], method: str, line: str) -> None:
    with pytest.raises(VarpiError, match=re.escape(line)):
        tiny.recipe(pair, *settings, method=method)


def test_a_split_that_is_not_there(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=r"preview\.split is 'test': .*no split 'test'"):
        quiet(tiny.recipe(pair, *PREVIEW, "preview.split=test"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- the page and the sinks


def test_tensorboard_gets_the_pictures(pair: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = quiet(tiny.recipe(pair, *PREVIEW, "training.steps=2", "logging.tensorboard=true"), tmp_path / "run")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("preview")] == [0, 2]
    assert [event.step for event in events.Scalars("preview_reward")] == [0, 2]


def test_the_page_follows_the_run(pair: Path, tmp_path: Path) -> None:
    pages: list[tuple[bool, str]] = []
    recipe = tiny.recipe(pair, *PREVIEW, "validation.every=3")
    from varpi.training import train

    def watch(run: Path, over: bool) -> None:
        pages.append((over, render_live(run, over)))

    train(recipe, tmp_path / "run", device="cpu", show=False, watch=watch)
    overs, texts = zip(*pages, strict=True)
    assert overs == (False, False, False, False, True)  # begun, 2, 3, 4, 6
    for over, text in pages:
        assert ('http-equiv="refresh"' in text) == (not over)
        assert "http" not in re.sub(r"http-equiv|https?://www\.w3\.org/\S*", "", text)
    assert "Training begins: 6 steps." in texts[0]
    assert "Step 4 of 6. About 0 s left" in texts[3] or "Step 4 of 6." in texts[3]
    assert "All 6 steps are done." in texts[4]
    assert [text.count('alt="Preview of step') for text in texts] == [1, 2, 2, 3, 3]
    assert "Held-out reward" in texts[4]
    assert "<svg" in texts[4]
    assert "group_size: 4" in texts[4]


def test_a_page_that_cannot_be_written_stops_no_run(
    pair: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = quiet(tiny.recipe(pair, "training.steps=1"), tmp_path / "run")
    (run / "live.html").mkdir()
    write_live(run, True)
    assert "live.html: the page could not be written" in caplog.text


def test_the_command_writes_it(pair: Path, tmp_path: Path) -> None:
    command = ["train", str(pair / "va_pi.yaml"), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--set", "training.steps=1"]) == 0
    assert "All 1 steps are done." in (tmp_path / "run" / "live.html").read_text()
