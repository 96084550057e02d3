"""Sample sets: the same bytes for any number of processes and after any interruption; other settings are refused."""

import json
import os
import shutil
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from training_runs import contents

from varpi.errors import VarpiError
from varpi.runtime import parts as waiting
from varpi.runtime.processes import World
from varpi.samples import writing
from varpi.samples.images import make_grid
from varpi.samples.reading import open_samples
from varpi.samples.writing import check_space, image_name, write_samples
from varpi.sampling.settings import Sampling

CLASSES = torch.arange(3).repeat(4)[:11]
GENERATOR, TOKENIZER = tiny.generator(), tiny.tokenizer()
SAMPLING = Sampling(seed=7, guidance_scale=1.5, temperature=0.9)


def write(folder: Path, world: World | None = None, **more: Any) -> bool:
    given = {"condition": CLASSES, "sampling": SAMPLING, "record": {"generator": "tiny"}, "batch_size": 3, **more}
    return write_samples(folder, GENERATOR, TOKENIZER, world=world, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "samples"
    assert write(folder)
    return folder


def together(folder: Path, size: int) -> None:
    """As so many processes, each a thread; the main one last, so that the others wait for its word."""
    others = [threading.Thread(target=write, args=(folder, World(rank, size, "cpu"))) for rank in range(1, size)]
    for other in others:
        other.start()
    write(folder, World(0, size, "cpu"))
    for other in others:
        other.join()


def test_what_is_written(whole: Path) -> None:
    names = [f"{i:05d}.png" for i in range(11)]
    assert set(contents(whole)) == {*names, "grid.png", "samples.npz", "sample.json"}
    images = np.stack([np.asarray(Image.open(whole / name)) for name in names])
    assert np.array_equal(np.load(whole / "samples.npz")["arr_0"], images)
    assert np.array_equal(np.asarray(Image.open(whole / "grid.png")), make_grid(images, 4))
    assert json.loads((whole / "sample.json").read_text()) == {
        "generator": "tiny",
        "resize": None,
        **asdict(SAMPLING),
        "batch_size": 3,
        "device": "cpu",
        "count": 11,
        "classes": CLASSES.tolist(),
    }


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_any_number_of_processes_writes_the_same_files(whole: Path, size: int, tmp_path: Path) -> None:
    together(tmp_path / "samples", size)
    assert contents(tmp_path / "samples") == contents(whole)


def test_each_process_makes_its_parts_and_the_main_one_waits(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    with pytest.raises(VarpiError, match=r"unfinished.json: not there after 0 seconds; another process"):
        write(tmp_path / "a", World(1, 2, "cpu"))
    with pytest.raises(VarpiError, match=r"00003.png to 00005.png: not there after 0 seconds; .* is slow or dead"):
        write(tmp_path / "a", World(0, 2, "cpu"))
    assert {path.name for path in (tmp_path / "a").glob("*.png")} == {f"{i:05d}.png" for i in (0, 1, 2, 6, 7, 8)}
    write(tmp_path / "a", World(1, 2, "cpu"))
    write(tmp_path / "a")  # another number of processes finishes
    assert contents(tmp_path / "a") == contents(whole)


def interrupted(folder: Path, part: int) -> None:
    """Begin, and die in the middle of a part: one of its images is there, the next half written."""
    save, wanted = writing.save_png, folder / f"{part * 3 + 1:05d}.png"

    def dying(path: Path, image: np.ndarray, **more: Any) -> None:
        if path == wanted:
            (folder / f".{path.name}.123.part").write_bytes(b"half")
            raise KeyboardInterrupt
        save(path, image, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "save_png", dying)
        with pytest.raises(KeyboardInterrupt):
            write(folder)


def test_interrupted_it_goes_on_where_it_was(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "samples"
    interrupted(folder, 2)
    with pytest.raises(VarpiError, match="its samples are unfinished; run `varpi sample` again"):
        open_samples(folder)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("0000[0-5].png")}
    assert len(kept) == 6
    made, generate = [], writing.generate_with
    monkeypatch.setattr(
        writing, "generate_with", lambda *given, **more: (made.append(more["first"]), generate(*given, **more))[1]
    )
    assert write(folder)
    assert made == [6, 9]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(folder) == contents(whole)


def test_finished_there_is_nothing_to_do(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(whole, tmp_path / "samples")
    monkeypatch.setattr(writing, "generate_with", lambda *_, **__: pytest.fail("made again"))
    assert [write(folder, World(rank, 2, "cpu")) for rank in (0, 1)] == [False, False]
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("lost", ["gone", "empty", "cut", "other size"])
def test_a_lost_or_damaged_image_is_made_again(whole: Path, lost: str, tmp_path: Path) -> None:
    """As a power failure leaves one, for images are not synced one by one."""
    folder = shutil.copytree(whole, tmp_path / "samples")
    (folder / "sample.json").rename(folder / "unfinished.json")
    image = folder / "00004.png"
    if lost == "gone":
        image.unlink()
    else:
        content = {"empty": b"", "cut": image.read_bytes()[:-30], "other size": (folder / "grid.png").read_bytes()}
        image.write_bytes(content[lost])
    assert write(folder)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sampling": replace(SAMPLING, seed=8)}, "seed is 7, here it is 8"),
        ({"batch_size": 4}, "batch_size is 3, here it is 4"),
        ({"record": {"generator": "another"}}, "generator is 'tiny', here it is 'another'"),
        ({"condition": CLASSES[:9]}, "count is 11, here it is 9"),
        ({"condition": CLASSES.flip(0)}, "classes is [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1], here it is [1, 0, 2, 1"),
    ],
)
def test_other_settings_are_refused(whole: Path, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    interrupted(tmp_path / "begun", 1)
    shutil.copytree(whole, tmp_path / "finished")
    before = contents(tmp_path)
    with pytest.raises(VarpiError) as begun:
        write(tmp_path / "begun", **more)
    assert f"begun/unfinished.json: {message}" in str(begun.value)
    assert "to go on, give the settings" in str(begun.value)
    with pytest.raises(VarpiError) as finished:
        write(tmp_path / "finished", **more)
    assert f"finished/sample.json: {message}" in str(finished.value)
    assert contents(tmp_path) == before


def test_settings_may_change_before_the_first_image(whole: Path, tmp_path: Path) -> None:
    """For instance to a smaller batch, when the memory did not suffice for one."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "unfinished.json").write_text('{"batch_size": 1000}')
    write(tmp_path / "samples")
    assert contents(tmp_path / "samples") == contents(whole)


def test_a_directory_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(VarpiError, match="already holds something"):
        write(tmp_path)
    with pytest.raises(VarpiError, match="already holds something"):
        write(tmp_path / "notes.txt")
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_full_disk_is_refused_before_the_first_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**9, 0, 9_003_000)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    check_space(tmp_path / "deep" / "samples", 1953, 32)  # 3 bytes a pixel, and half of that: 8,999,424
    message = r"no space left on the disk for 1,954 images of 32x32 pixels: they take about 9 MB, and 9 MB are free"
    with pytest.raises(VarpiError, match=message):
        check_space(tmp_path / "deep" / "samples", 1954, 32)
    (tmp_path / "00000.png").write_bytes(b"")
    (tmp_path / "00001.png").write_bytes(b"")
    check_space(tmp_path, 1954, 32)  # what is there takes no more


def test_an_absurd_batch_is_refused(tmp_path: Path) -> None:
    images = torch.zeros(1, dtype=torch.int64).expand(10**12)  # takes no memory itself
    with pytest.raises(
        VarpiError,
        match=r"batch_size 1000000000000: their logits and pixels: 2980232 GiB are needed, and this machine has",
    ):
        write(tmp_path / "samples", condition=images, batch_size=10**12)
    with pytest.raises(VarpiError, match="batch_size is 0; it must be at least 1"):
        write(tmp_path / "samples", batch_size=0)
    assert contents(tmp_path) == {}


def test_a_batch_holds_no_more_than_there_are(whole: Path, tmp_path: Path) -> None:
    write(tmp_path / "samples", batch_size=10**12)
    assert json.loads((tmp_path / "samples" / "sample.json").read_text())["batch_size"] == 11


def test_names_keep_the_order_of_numbers() -> None:
    assert image_name(7, 100_000) == "00007.png"
    assert [image_name(i, 100_001) for i in (9, 99_999, 100_000)] == ["000009.png", "099999.png", "100000.png"]


def test_files_are_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each, once = [], []
    monkeypatch.setattr(os, "fsync", each.append)
    monkeypatch.setattr(os, "sync", lambda: once.append(sorted(path.name for path in tmp_path.glob("s/*.json"))))
    write(tmp_path / "s")
    assert len(each) == 2  # the record and the grid
    assert once == [["unfinished.json"]]
