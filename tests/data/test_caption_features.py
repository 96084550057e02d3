import json
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_t5
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from varpi.data import BadImage, Dropped, Item, open_dataset
from varpi.data.caption_features import EncodeCounts, WithFeatures, encode_captions, read_features, write_features
from varpi.data.left_out import LeftOut
from varpi.data.text_encoder import TextEncoder
from varpi.errors import VarpiError

CAPTIONS = ("a red cat", "a dog of a cat", None, "a photo", "a", "red red red", "dog", "a photo of a red dog")


class Captions:
    """Captions beside images of one color, (index / 10); None is an unusable caption."""

    num_classes = None
    class_names = None
    fingerprint = "0123"

    def __init__(self, captions: Sequence[str | None] = CAPTIONS) -> None:
        self.captions = captions
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Item:
        self.decoded.append(index)
        return Item(torch.full((3, 4, 4), index / 10), self.caption(index))

    def caption(self, index: int) -> str:
        caption = self.captions[index]
        if caption is None:
            raise Dropped(f"item {index}: no caption")
        return caption

    def name(self, index: int) -> str:
        return f"item {index}"

    def key(self, index: int) -> str:
        return f"{index % 2:05d}/photo.{index}"  # a stem may have a dot in it


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"), ("a", "photo", "of", "cat", "dog", "red"))


@pytest.fixture
def encoder(t5: Path) -> TextEncoder:
    return TextEncoder(t5)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def features(length: int = 7, width: int = 16) -> Tensor:
    return torch.randn(length, width)


# -- files


def test_npy_is_llamagens(tmp_path: Path) -> None:
    exact = features()
    write_features(tmp_path / "deep" / "a.b.npy", exact, "npy")
    stored = np.load(tmp_path / "deep" / "a.b.npy", allow_pickle=False)
    assert (stored.shape, stored.dtype) == ((1, 7, 16), np.float32)
    assert np.array_equal(stored[0], exact.numpy())
    assert torch.equal(read_features(tmp_path / "deep" / "a.b.npy"), exact)


def test_safetensors_rounds_to_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    exact = features(50) * torch.logspace(-3, 3, 50)[:, None]
    write_features(path, exact, "safetensors")
    (stored,) = load_file(path).values()
    assert (list(load_file(path)), stored.dtype, stored.shape) == (["features"], torch.bfloat16, (50, 16))
    read = read_features(path)
    assert read.dtype == torch.float32
    relative = ((read - exact) / exact).abs().max()
    assert 1e-4 < relative <= 2**-8  # half a unit of the eighth significant bit
    write_features(path, read, "safetensors")  # what is bfloat16 already loses nothing more
    assert torch.equal(read_features(path), read)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_npy_without_a_batch_dimension(dtype: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6, dtype=dtype).reshape(2, 3))
    assert torch.equal(read_features(tmp_path / "a.npy"), torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros(3, np.float32), r"a.npy: holds torch.float32 \(3,\); caption features are float \(L, C\)"),
        (np.zeros((2, 3, 4), np.float32), r"a.npy: holds torch.float32 \(2, 3, 4\)"),
        (np.zeros((1, 0, 4), np.float32), r"a.npy: holds torch.float32 \(0, 4\)"),
        (np.zeros((2, 3), np.int64), r"a.npy: holds torch.int64 \(2, 3\)"),
        (np.full((2, 3), np.nan), r"a.npy: the caption features hold values that are not finite"),
        (np.array([[None]]), r"a.npy: not a readable file of caption features \(ValueError: it holds Python objects"),
    ],
)
def test_npy_that_holds_something_else(array: np.ndarray, match: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(VarpiError, match=match):
        read_features(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"features": torch.zeros(1, 2, 3)}, r"holds torch.float32 \(1, 2, 3\)"),
        ({"features": torch.zeros(0, 3)}, r"holds torch.float32 \(0, 3\)"),
        ({"features": torch.full((2, 3), torch.inf)}, "not finite"),
        ({"tokens": torch.zeros(2, 3)}, "not a readable file of caption features .*features"),
    ],
)
def test_safetensors_that_hold_something_else(tensors: dict[str, Tensor], match: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(VarpiError, match=rf"a.safetensors: .*{match}"):
        read_features(tmp_path / "a.safetensors")


@pytest.mark.parametrize("form", ["npy", "safetensors"])
@pytest.mark.parametrize("size", [0, 5, 60, 140, 300])
def test_damaged_files(form: Any, size: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{form}"
    write_features(path, features(), form)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(VarpiError, match=rf"a.{form}: not a readable file of caption features .*; encode it again"):
        read_features(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=r"a.npy: not a readable file .*FileNotFoundError"):
        read_features(tmp_path / "a.npy")


def test_bad_features_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_features(path, torch.ones(2, 3), "npy")
    for wrong in (torch.full((2, 3), torch.nan), torch.zeros(1, 2, 3), torch.zeros(0, 3)):
        with pytest.raises(VarpiError, match=r"a.npy: "):
            write_features(path, wrong, "npy")
    with pytest.raises(VarpiError, match=r"a.npy: the name of a file of form 'safetensors' must end in .safetensors"):
        write_features(path, torch.zeros(2, 3), "safetensors")
    assert torch.equal(read_features(path), torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == [path]


# -- reading them in training


def stored(root: Path, dataset: Captions, indices: Sequence[int], form: Any = "safetensors") -> dict[int, Tensor]:
    values = {index: torch.full((index + 1, 4), float(index)) for index in indices}
    for index, value in values.items():
        write_features(root / f"{dataset.key(index)}.{form}", value, form)
    return values


def test_features_take_the_place_of_captions(tmp_path: Path) -> None:
    dataset = Captions()
    expected = stored(tmp_path, dataset, [0, 1]) | stored(tmp_path, dataset, [3], "npy")
    loaded = WithFeatures(dataset, tmp_path)
    assert (len(loaded), loaded.num_classes, loaded.class_names) == (8, None, None)
    assert (loaded.caption(1), loaded.key(1)) == ("a dog of a cat", "00001/photo.1")
    for copy in (loaded, pickle.loads(pickle.dumps(loaded))):
        for index, value in expected.items():
            image, condition = copy[index]
            assert isinstance(condition, Tensor)
            assert torch.equal(condition, value)
            assert torch.equal(image, torch.full((3, 4, 4), index / 10))


def test_safetensors_come_first(tmp_path: Path) -> None:
    dataset = Captions()
    stored(tmp_path, dataset, [0])
    write_features(tmp_path / f"{dataset.key(0)}.npy", torch.ones(9, 4), "npy")
    assert WithFeatures(dataset, tmp_path)[0].condition.shape == (1, 4)  # pyright: ignore[reportAttributeAccessIssue]


def test_items_without_features_are_dropped_unseen(tmp_path: Path) -> None:
    dataset = Captions()
    stored(tmp_path, dataset, [0, 2])
    loaded = WithFeatures(dataset, tmp_path)
    with pytest.raises(Dropped, match=r"no caption features at .*00001/photo.3.safetensors or .npy; run `varpi enco"):
        loaded[3]
    assert dataset.decoded == []
    with pytest.raises(Dropped, match="item 2: no caption"):  # the dataset's own reasons stand
        loaded[2]


def test_a_damaged_file_is_a_bad_item(tmp_path: Path) -> None:
    dataset = Captions()
    stored(tmp_path, dataset, [0, 1])
    (tmp_path / f"{dataset.key(1)}.safetensors").write_bytes(b"cut short")
    loaded = WithFeatures(dataset, tmp_path)
    with pytest.raises(BadImage, match=r"00001/photo.1.safetensors: not a readable file of caption features"):
        loaded[1]
    assert dataset.decoded == []


def test_fingerprint_tells_features_from_captions_alone(tmp_path: Path) -> None:
    dataset, other = Captions(), Captions()
    other.fingerprint = "4567"
    stored(tmp_path / "a", dataset, [0])
    stored(tmp_path / "b", dataset, [0, 1])
    fingerprint = WithFeatures(dataset, tmp_path / "a").fingerprint
    assert fingerprint == WithFeatures(dataset, tmp_path / "b").fingerprint
    assert len({fingerprint, dataset.fingerprint, WithFeatures(other, tmp_path / "a").fingerprint}) == 3


def test_a_root_without_features(tmp_path: Path) -> None:
    dataset = Captions(["a cat"] * 1001)
    message = (
        r"^(?P<root>.*/root): no caption features for any of the first 1000 items \(the first would be "
        r"(?P=root)/00000/photo.0.safetensors or .npy\); run `varpi encode captions`, or name another root$"
    )
    with pytest.raises(VarpiError, match=message):
        WithFeatures(dataset, tmp_path / "root")
    stored(tmp_path / "root", dataset, [1000])  # too late
    with pytest.raises(VarpiError, match=message):
        WithFeatures(dataset, tmp_path / "root")
    stored(tmp_path / "root", dataset, [999])
    assert len(WithFeatures(dataset, tmp_path / "root")) == 1001


# -- writing them


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_every_caption_is_encoded(form: Any, encoder: TextEncoder, tmp_path: Path) -> None:
    dataset = Captions()
    assert encode_captions(dataset, encoder, tmp_path, form=form, batch_size=3) == EncodeCounts(7, 0)
    names = {f"{dataset.key(index)}.{form}" for index in (0, 1, 3, 4, 5, 6, 7)}
    assert set(contents(tmp_path)) == names | {"encoder.json"}
    assert json.loads((tmp_path / "encoder.json").read_text()) == {
        "encoder": encoder.source,
        "width": 16,
        "max_tokens": 120,
        "form": form,
    }
    loaded = WithFeatures(dataset, tmp_path)
    for index in (0, 1, 3, 4, 5, 6, 7):
        condition = loaded[index].condition
        (expected,) = encoder([dataset.caption(index)])
        assert isinstance(condition, Tensor)
        # bfloat16 through and through, so that only the company in a batch makes a difference
        torch.testing.assert_close(condition, expected, atol=0.02, rtol=0.02)
    assert dataset.decoded == [0, 1, 3, 4, 5, 6, 7]  # by `loaded` alone


def test_storing_in_bfloat16_loses_nothing_of_a_bfloat16_encoder(encoder: TextEncoder, tmp_path: Path) -> None:
    encode_captions(Captions(), encoder, tmp_path / "half", batch_size=1)
    encode_captions(Captions(), encoder, tmp_path / "full", batch_size=1, form="npy")
    half, full = (
        read_features(tmp_path / name) for name in ("half/00001/photo.7.safetensors", "full/00001/photo.7.npy")
    )
    assert torch.equal(half, full)


def test_starting_again_writes_only_what_is_missing(encoder: TextEncoder, tmp_path: Path) -> None:
    dataset = Captions()
    encode_captions(dataset, encoder, tmp_path, batch_size=1)
    before = contents(tmp_path)
    lost, damaged = (tmp_path / f"{dataset.key(index)}.safetensors" for index in (0, 5))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*/*.safetensors")}
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert encode_captions(dataset, encoder, tmp_path, batch_size=1) == EncodeCounts(2, 5)
    assert contents(tmp_path) == before
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {lost, damaged}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_writes_what_one_does(size: int, encoder: TextEncoder, tmp_path: Path) -> None:
    """To the bit, though a pass in bfloat16 rounds by the captions that are in it."""
    dataset = Captions()
    encode_captions(dataset, encoder, tmp_path / "one", batch_size=3)
    shares = [
        encode_captions(dataset, encoder, tmp_path / "many", batch_size=3, rank=rank, world_size=size)
        for rank in range(size)
    ]
    of_passes = [EncodeCounts(2, 0), EncodeCounts(3, 0), EncodeCounts(2, 0), EncodeCounts(0, 0)]
    assert shares == ([EncodeCounts(4, 0), of_passes[1]] if size == 2 else of_passes[:size])
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


KILLED = """
import os, signal, sys
from varpi.runtime import files
from varpi.cli.main import main

count, replace = 0, os.replace

def dying(source, target):
    global count
    count += str(target).endswith(".npy")
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

files.os.replace = dying
main(sys.argv[1:])
"""


def test_a_killed_run_leaves_nothing_that_the_next_does_not_clear(
    t5: Path, encoder: TextEncoder, tmp_path: Path
) -> None:
    lines = (json.dumps({"image_path": "x.png", "text": caption}) for caption in ("a cat", "a dog", "red"))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    root = tmp_path / "features"
    command = ["encode", "captions", str(tmp_path / "a.jsonl"), "--text-encoder", str(t5), "--output", str(root)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command, "--device", "cpu"], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name for path in root.rglob("*") if path.is_file()}
    assert {"encoder.json", "0.npy"} < left
    (part,) = left - {"encoder.json", "0.npy"}
    assert re.fullmatch(r"\.1\.npy\.\d+\.part", part)
    (root / "a" / ".7.npy.12.part").write_bytes(b"of another process, which writes another file")
    (root / ".encoder.json.12.part").write_bytes(b"")
    dataset: Any = open_dataset(tmp_path / "a.jsonl", image_size=1)
    assert encode_captions(dataset, encoder, root, form="npy") == EncodeCounts(2, 1)
    assert set(contents(root)) == {"encoder.json", "a/0.npy", "a/1.npy", "a/2.npy", "a/.7.npy.12.part"}


def test_captions_left_out_are_counted_with_their_reason(encoder: TextEncoder, tmp_path: Path) -> None:
    left_out = LeftOut()
    captions = Captions(["a cat", None, "<br/>", "free shipping", "a dog"])
    assert encode_captions(captions, encoder, tmp_path, left_out=left_out) == EncodeCounts(2, 0)
    assert left_out.found == {
        "not to be used": (1, "item 1: no caption"),
        "with a caption of which cleaning leaves nothing": (
            2,
            "item 2: cleaning leaves nothing of the caption '<br/>'",
        ),
    }


def test_a_lost_file_is_written_again_to_the_bit(encoder: TextEncoder, tmp_path: Path) -> None:
    dataset = Captions()
    encode_captions(dataset, encoder, tmp_path, batch_size=8)
    before = contents(tmp_path)
    (tmp_path / f"{dataset.key(3)}.safetensors").unlink()
    assert encode_captions(dataset, encoder, tmp_path, batch_size=8) == EncodeCounts(1, 6)
    assert contents(tmp_path) == before


def test_a_long_caption_fills_max_tokens(encoder: TextEncoder, tmp_path: Path) -> None:
    encode_captions(Captions(["a cat, " * 1500]), encoder, tmp_path)
    assert read_features(tmp_path / "00000" / "photo.0.safetensors").shape == (120, 16)


def test_batch_size_is_the_encoders(encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda captions: passes.append(len(captions)) or encode(captions))
    encode_captions(Captions(["a cat"] * 100), encoder, tmp_path, batch_size=64)
    assert passes == [64, 36]


def test_each_split_has_features_of_its_own(encoder: TextEncoder, tmp_path: Path) -> None:
    """Their files have the same names, so that one's must not be taken for the other's."""
    train, held_out = Captions(["a cat"]), Captions(["a dog"])
    encode_captions(train, encoder, tmp_path, about={"split": "train"})
    with pytest.raises(VarpiError, match=r"encoder.json: split is 'train', here it is 'validation'; choose another"):
        encode_captions(held_out, encoder, tmp_path, about={"split": "validation"})
    message = r"holds features of split 'train', not 'validation'; encode these into .*/validation \(varpi encode "
    with pytest.raises(VarpiError, match=message):
        WithFeatures(held_out, tmp_path, "validation")
    encode_captions(held_out, encoder, tmp_path / "validation", about={"split": "validation"})
    for dataset, split in ((train, "train"), (held_out, "validation")):
        found: Any = WithFeatures(dataset, tmp_path, split)[0].condition
        (own,) = encoder([dataset.caption(0)])
        assert torch.allclose(found, own.float(), atol=0.02)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"encoder": "google/flan-t5-xl"}, r"encoder.json: encoder is 'google/flan-t5-xl', here it is '.*'"),
        ({"width": 2048}, r"encoder.json: width is 2048, here it is 16; choose another root"),
        ({"max_tokens": 77}, r"encoder.json: max_tokens is 77, here it is 120"),
        ({"form": "npy"}, r"encoder.json: form is 'npy', here it is 'safetensors'"),
    ],
)
def test_the_root_of_another_encoder(changed: dict, match: str, encoder: TextEncoder, tmp_path: Path) -> None:
    encode_captions(Captions(["a cat"]), encoder, tmp_path)
    record = tmp_path / "encoder.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changed))
    before = contents(tmp_path)
    with pytest.raises(VarpiError, match=match):
        encode_captions(Captions(), encoder, tmp_path)
    assert contents(tmp_path) == before


def test_features_of_another_width_without_a_record(encoder: TextEncoder, tmp_path: Path) -> None:
    dataset = Captions()
    write_features(tmp_path / f"{dataset.key(1)}.npy", features(5, 2048), "npy")
    with pytest.raises(VarpiError, match=r"photo.1.npy: holds features of width 2048, the encoder's is 16"):
        encode_captions(dataset, encoder, tmp_path, form="npy")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_record(text: str, encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text(text)
    with pytest.raises(VarpiError, match=r"encoder.json: .*choose another (root|place)"):
        encode_captions(Captions(), encoder, tmp_path)


def test_a_root_that_cannot_be_written(encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(encoder, "_encode", lambda captions: pytest.fail("encoded before the root was tried"))
    with pytest.raises(VarpiError, match=r"file/root/encoder.json: could not be written \(NotADirectoryError"):
        encode_captions(Captions(), encoder, tmp_path / "file" / "root")


@pytest.mark.parametrize("key", ["../outside", "/etc/outside"])
def test_a_key_must_stay_below_the_root(key: str, encoder: TextEncoder, tmp_path: Path) -> None:
    dataset = Captions()
    dataset.key = lambda index: key
    with pytest.raises(VarpiError, match=rf"'{key}': the name of an item must not lead out"):
        encode_captions(dataset, encoder, tmp_path / "root")
    with pytest.raises(VarpiError, match="must not lead out"):
        WithFeatures(dataset, tmp_path / "root")
    assert set(contents(tmp_path)) == {"root/encoder.json"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"form": "pt"}, "form is 'pt'; it must be one of safetensors, npy"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank is 2; it must be in \[0, 2\)"),
    ],
)
def test_bad_arguments(arguments: dict, match: str, encoder: TextEncoder, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=match):
        encode_captions(Captions(), encoder, tmp_path, **arguments)
    assert contents(tmp_path) == {}


def test_progress(encoder: TextEncoder, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encode_captions(Captions(), encoder, tmp_path / "quiet")
    assert capfd.readouterr().err == ""
    encode_captions(Captions(), encoder, tmp_path / "shown", progress=True)
    shown = capfd.readouterr()
    assert "encoding captions" in shown.err
    assert "100%" in shown.err
    assert shown.out == ""
