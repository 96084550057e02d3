"""Captions that a generator cannot use are left out where data is loaded, and counted with their reason."""

import pickle
from itertools import islice
from pathlib import Path

import pytest
from cases import EMPTIED, WHICH, caption_case, captioned
from shards import png, write_tar

from varpi.data import Batches, Dropped, open_dataset
from varpi.data.caption_check import checked, refuse_emptied
from varpi.data.left_out import LeftOut
from varpi.data.stream import StreamBatches


def no_cats(caption: str, name: str) -> None:
    if "cat" in caption:
        raise Dropped(f"{name}: a cat", "with a cat")


def test_what_cleaning_empties() -> None:
    refuse_emptied(EMPTIED[0], "x:1")
    for caption in EMPTIED[1:]:
        with pytest.raises(Dropped, match=r"^x:2: cleaning leaves nothing of the caption '") as refused:
            refuse_emptied(caption, "x:2")
        assert refused.value.reason == "with a caption of which cleaning leaves nothing"


@pytest.mark.parametrize("which", WHICH)
def test_emptied_captions_of_the_shared_case(which: str, tmp_path: Path) -> None:
    file = caption_case(which, "empty-after-cleaning.jsonl", tmp_path)
    batches = Batches(open_dataset(file, image_size=16), batch_size=5, seed=0)
    batches.check_captions(pickle.loads(pickle.dumps(refuse_emptied)))
    assert set(batches.at(0).condition) == {EMPTIED[0]}
    count, example = batches.left_out.found["with a caption of which cleaning leaves nothing"]
    assert count == batches.dropped == batches.seen - 5 >= 4
    assert example.startswith(f"{file}:")


@pytest.mark.parametrize("name", ["blank-lines.jsonl", "crlf-bom.jsonl"])
@pytest.mark.parametrize("which", WHICH)
def test_lines_that_hold_nothing_are_no_items(which: str, name: str, tmp_path: Path) -> None:
    file = caption_case("shared", name, tmp_path) if which == "shared" else captioned(tmp_path, name, ["one", "two"])
    if which == "own":
        one, two = file.read_bytes().splitlines()
        if name.startswith("blank"):
            file.write_bytes(one + b"\n   \n\t\n" + two + b"\n  \n\n")
        else:
            file.write_bytes(b"\xef\xbb\xbf" + one + b"\r\n\r\n" + two + b"\r\n")
    dataset = open_dataset(file, image_size=16)
    assert [dataset[i].condition for i in range(len(dataset))] == ["one", "two"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_without_refused_captions(workers: int, tmp_path: Path) -> None:
    file = captioned(tmp_path, "a.jsonl", ["a cat", "a dog", "two cats", "a moon", "no image"])
    file.write_text(file.read_text()[::-1].replace("x.png"[::-1], "y.png"[::-1], 1)[::-1])  # the last has none
    batches = Batches(
        open_dataset(file, image_size=16), batch_size=4, seed=0, workers=workers, max_bad_fraction=1, world_size=1
    )
    batches.check_captions(no_cats)
    for batch in islice(batches.from_step(0), 6):
        assert set(batch.condition) <= {"a dog", "a moon"}
    found = batches.left_out.found
    assert set(found) == {"unreadable", "with a cat"}
    assert found["unreadable"][0] == batches.bad >= 1
    assert found["with a cat"][0] == batches.dropped >= 2
    assert found["with a cat"][1] in {f"{file}:1: a cat", f"{file}:3: a cat"}
    assert batches.seen == 24 + len(batches.left_out)
    batches.check_captions(None)
    assert any("cat" in caption for batch in islice(batches.from_step(0), 6) for caption in batch.condition)


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_without_refused_captions(workers: int, tmp_path: Path) -> None:
    members = {"a.png": png(1), "a.txt": b"a cat", "b.png": png(2), "b.txt": b"a dog", "c.txt": b"a moon"}
    shard = write_tar(tmp_path / "s.tar", members)
    stream = StreamBatches.open(shard, image_size=16, batch_size=2, seed=0, workers=workers)
    stream.check_captions(no_cats)
    for batch in islice(stream.from_cursor(0), 3):
        assert batch.condition == ["a dog", "a dog"]
    found = stream.left_out.found
    assert found["with a cat"] == (found["with a cat"][0], f"{shard}/a: a cat")
    assert found["without an image"] == (found["without an image"][0], f"{shard}/c: no image")
    assert min(count for count, _ in found.values()) >= 5
    assert stream.seen == 6 + len(stream.left_out)


def test_a_check_is_for_captions() -> None:
    digits = open_dataset("digits", image_size=32)
    assert checked(digits, no_cats) is digits
    captions = open_dataset("captioned-digits", image_size=32)
    assert checked(captions, None) is captions
    assert checked(captions, no_cats).fingerprint == captions.fingerprint


def test_one_line_says_what_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    left_out = LeftOut({"unreadable": (2, "a.png: torn")}, {"too small": [1, "b.png"], "unreadable": [3, "c.png"]})
    left_out.note(Dropped("d.png: no caption", "without a usable caption"))
    expected = (
        "left out 7 of 9 images: 5 unreadable (a.png: torn); 1 too small (b.png); 1 without a usable caption "
        "(d.png: no caption)"
    )
    assert (len(left_out), left_out.line(9, "images")) == (7, expected)
    left_out.say("data", 9, "images")
    LeftOut().say("data", 9, "images")
    assert [record.getMessage() for record in caplog.records] == [f"data: {expected}"]
