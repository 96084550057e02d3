"""Tokens made once for a whole data set are those that every step would have made."""

from pathlib import Path

import pytest
import tiny
import torch
from training_runs import crash, numbers, quiet, same, weights

from varpi.data.mirrored import Mirrored
from varpi.data.source import open_dataset
from varpi.errors import VarpiError
from varpi.methods.next_token import NextToken
from varpi.methods.token_cache import cached_tokens
from varpi.training.validation import as_batch


def tokens_of(source: Path, folder: Path, seed: int = 2) -> torch.Tensor:
    dataset = Mirrored(open_dataset(source, image_size=16))
    return cached_tokens(dataset, tiny.tokenizer(seed=seed), folder, image_size=16, device="cpu")


def test_tokens_of_every_image_and_its_mirror_image(pair: Path, tmp_path: Path) -> None:
    tokens = tokens_of(pair / "images", tmp_path)
    dataset, tokenizer = open_dataset(pair / "images", image_size=16), tiny.tokenizer()
    images = torch.stack([dataset[i].image for i in range(len(dataset))])
    assert torch.equal(tokens, torch.cat([tokenizer.encode(images), tokenizer.encode(images.flip(-1))]).int())
    assert len(list(tmp_path.iterdir())) == 1


def test_the_file_is_read_again_and_is_of_one_tokenizer(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokens_of(pair / "images", tmp_path)
    assert not torch.equal(tokens_of(pair / "images", tmp_path, seed=7), first)
    monkeypatch.setattr("varpi.methods.token_cache._encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(tokens_of(pair / "images", tmp_path), first)


def test_a_damaged_file_is_named(pair: Path, tmp_path: Path) -> None:
    tokens_of(pair / "images", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(VarpiError, match=rf"{path.name}: holds no tokens .*; delete it, and it is made again"):
        tokens_of(pair / "images", tmp_path)


def test_an_unreadable_image_has_no_tokens(tmp_path: Path) -> None:
    images = tiny.images(tmp_path / "images", per_class=2)
    (images / "b" / "0.png").write_bytes(b"no image")
    tokens = tokens_of(images, tmp_path / "cache")
    assert [row for row in range(12) if (tokens[row] < 0).all()] == [2, 8]
    assert (tokens >= 0).sum() == 10 * 16


def test_an_image_that_can_be_read_again_is_encoded(tmp_path: Path) -> None:
    images = tiny.images(tmp_path / "images", per_class=2)
    good = (images / "b" / "0.png").read_bytes()
    (images / "b" / "0.png").write_bytes(b"no image")
    tokens = tokens_of(images, tmp_path / "cache")
    (images / "b" / "0.png").write_bytes(good)
    dataset, tokenizer = Mirrored(open_dataset(images, image_size=16)), tiny.tokenizer()
    method = NextToken(tiny.generator(), tokenizer, None, tokens=tokens)
    chosen = [2, 3, 8]
    batch = as_batch(method, {index: dataset[index] for index in chosen}, "cpu")
    assert torch.equal(method.encode(batch), tokenizer.encode(batch.images))
    assert (tokens[chosen] < 0).any()


def test_training_from_cached_tokens_is_training(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of a run that encodes each batch; a crash changes nothing; and no step encodes."""
    settings = ("data.flip=true", "training.save_every=2", "training.steps=12")
    encoding = quiet(tiny.recipe(pair, *settings, method="next_token"), tmp_path / "encoding")
    cached = tiny.recipe(pair, *settings, f"method.token_cache={tmp_path / 'cache'}", method="next_token")
    through = quiet(cached, tmp_path / "through")
    losses = [[row["loss"] for row in numbers(run)] for run in (through, encoding)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)

    monkeypatch.setattr("varpi.methods.token_cache._encode", lambda *_: pytest.fail("encoded again"))
    crash(monkeypatch, cached, tmp_path / "run", 9)
    run = quiet(cached, tmp_path / "run", resume=True)
    assert same(weights(run), weights(through))
    assert numbers(run) == numbers(through)


def test_each_micro_batch_has_its_own_tokens(pair: Path, tmp_path: Path) -> None:
    settings = ("training.micro_batch=2", "training.steps=2")
    encoding = quiet(tiny.recipe(pair, *settings, method="next_token"), tmp_path / "encoding")
    cached = tiny.recipe(pair, *settings, f"method.token_cache={tmp_path / 'cache'}", method="next_token")
    losses = [[row["loss"] for row in numbers(run)] for run in (quiet(cached, tmp_path / "run"), encoding)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_stream_has_no_indices(pair: Path) -> None:
    with pytest.raises(VarpiError, match=r"method\.token_cache needs data that can be looked up"):
        tiny.recipe(pair, "method.token_cache=c", "data.stream=true", method="next_token")
    with pytest.raises(VarpiError, match=r"data: flip needs data that can be looked up"):
        tiny.recipe(pair, "data.flip=true", "data.stream=true", method="next_token")


def test_micro_batches_find_their_own_tokens(pair: Path, tmp_path: Path) -> None:
    logs = []
    for settings in (("training.micro_batch=3",), (f"method.token_cache={tmp_path}", "training.micro_batch=3")):
        recipe = tiny.recipe(pair, "training.steps=2", *settings, method="next_token")
        logs.append([row["loss"] for row in numbers(quiet(recipe, tmp_path / f"run{len(logs)}"))])
    assert logs[0] == logs[1]
