"""The tokens of images in one file: the same for any number of processes, and whatever interrupted them."""

import json
import threading
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import contents

from varpi.data import image_tokens, open_dataset
from varpi.data.image_tokens import encode_images
from varpi.errors import VarpiError
from varpi.runtime import parts as waiting
from varpi.runtime.processes import World

TOKENIZER = tiny.tokenizer()


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty-four images, two of which cannot be read, in parts of two batches of three."""
    monkeypatch.setattr(image_tokens, "PART", 6)
    folder = tiny.images(tmp_path / "images")
    (folder / "a" / "3.png").write_bytes(b"none")
    (folder / "c" / "7.png").write_bytes(b"none")
    return folder


def encode(images: Path, output: Path, world: World | None = None, **more: Any) -> tuple[int, bool]:
    dataset = open_dataset(images, image_size=16, split="train")
    given = {"about": {"data": str(images)}, "image_size": 16, "batch_size": 3, **more}
    return encode_images(dataset, TOKENIZER, output, world=world, **given)


def test_the_file(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for made in (True, False):  # the second time it is told from the file
        assert encode(images, tmp_path / "t.safetensors") == (22, made)
        (said,) = (record.getMessage() for record in caplog.records)
        assert said.startswith(f"{images}: left out 2 of 24 images: 2 unreadable ({images}/a/3.png: unreadable image (")
        caplog.clear()
    tensors = load_file(tmp_path / "t.safetensors")
    indices = [i for i in range(24) if i not in (3, 23)]
    assert tensors["indices"].tolist() == indices
    assert tensors["classes"].tolist() == [i // 8 for i in indices]
    dataset = open_dataset(images, image_size=16, split="train")
    for row in (0, 2, 3, 21):
        expected = TOKENIZER.encode(dataset[indices[row]].image[None])[0].int()
        assert torch.equal(tensors["tokens"][row], expected)
    assert not (tmp_path / "t.safetensors.unfinished").exists()


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_any_number_of_processes_writes_the_same_file(images: Path, size: int, tmp_path: Path) -> None:
    one, many = tmp_path / "one" / "t.safetensors", tmp_path / "many" / "t.safetensors"
    encode(images, one)
    others = [threading.Thread(target=encode, args=(images, many, World(r, size, "cpu"))) for r in range(1, size)]
    for other in others:
        other.start()
    assert encode(images, many, World(0, size, "cpu")) == (22, True)
    for other in others:
        other.join()
    assert contents(many.parent) == contents(one.parent)


def test_interrupted_it_goes_on_where_it_was(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, again = tmp_path / "one" / "t.safetensors", tmp_path / "again" / "t.safetensors"
    encode(images, one)
    batches, real = [], TOKENIZER.encode

    def dying(batch: torch.Tensor) -> torch.Tensor:
        batches.append(len(batch))
        if len(batches) == 5:  # one to try the size, two of the first part, one of the second
            raise KeyboardInterrupt
        return real(batch)

    with monkeypatch.context() as patch:
        patch.setattr(TOKENIZER, "encode", dying)
        with pytest.raises(KeyboardInterrupt):
            encode(images, again)
    assert {path.name for path in again.parent.rglob("*") if path.is_file()} == {"request.json", "000000.safetensors"}
    with monkeypatch.context() as patch:
        batches.clear()
        patch.setattr(TOKENIZER, "encode", lambda batch: (batches.append(len(batch)), real(batch))[1])
        assert encode(images, again, World(0, 1, "cpu")) == (22, True)
    assert batches == [1, 3, 3, 3, 3, 3, 2]
    assert contents(again.parent) == contents(one.parent)


def test_a_process_that_never_comes(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.1)
    with pytest.raises(VarpiError, match=r"unfinished/000001.safetensors: not there after 0 seconds"):
        encode(images, tmp_path / "t.safetensors", World(0, 2, "cpu"))
    assert encode(images, tmp_path / "t.safetensors") == (22, True)


def test_finished_there_is_nothing_to_do(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out" / "t.safetensors"
    encode(images, output)
    before = contents(output.parent)
    monkeypatch.setattr(image_tokens, "_encode", lambda *_: pytest.fail("encoded again"))
    assert encode(images, output) == (22, False)
    assert encode(images, output, World(1, 2, "cpu")) == (22, False)
    assert contents(output.parent) == before


def test_other_settings_are_refused(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.safetensors"
    encode(images, output)
    with pytest.raises(VarpiError, match=r"holds other tokens \(batch_size is 3, here it is 4\); choose another"):
        encode(images, output, batch_size=4)
    folder = tmp_path / "t.safetensors.unfinished"
    folder.mkdir()
    (folder / "request.json").write_text('{"data": "elsewhere"}')
    (folder / "000000.safetensors").write_bytes(b"")
    output.unlink()
    with pytest.raises(VarpiError, match=r"request.json: data is 'elsewhere', here it is .*, or remove .*unfinished$"):
        encode(images, output)
    (folder / "000000.safetensors").unlink()
    assert encode(images, output) == (22, True)  # nothing was made with the other settings


def test_what_is_refused(images: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    with pytest.raises(VarpiError, match="batch_size is 0; it must be at least 1"):
        encode(images, tmp_path / "t", batch_size=0)
    with pytest.raises(VarpiError, match="sides divisible by 4"):
        encode(images, tmp_path / "t", image_size=18)
    assert contents(tmp_path) == before
    for image in images.rglob("*.png"):
        image.write_bytes(b"none")
    with pytest.raises(VarpiError, match=r"images: none of its 24 images can be used: 24 unreadable \("):
        encode(images, tmp_path / "t")
    assert {path.name for path in tmp_path.iterdir()} == {"images"}


def test_the_metadata_says_what_decides_the_tokens(images: Path, tmp_path: Path) -> None:
    encode(images, tmp_path / "t.safetensors", batch_size=10**9)
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["varpi"]) == {
            "data": str(images),
            "fingerprint": open_dataset(images, image_size=16, split="train").fingerprint,
            "image_size": 16,
            "batch_size": 24,
            "device": "cpu",
            "class_names": ["a", "b", "c"],
            "left_out": {"unreadable": [2, ANY]},
        }
