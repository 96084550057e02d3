import importlib.resources
import itertools
import logging
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from shards import png, red_of, write_shard, write_tar

from varpi.data import BadImage, Batch, Dropped, Item
from varpi.data.lanes import Lanes
from varpi.data.opening import open_held_out
from varpi.data.stream import FirstRows, Row, StreamBatches
from varpi.errors import VarpiError
from varpi.recipe import parse_recipe


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _file(numbers: range) -> Iterator[Row]:
    return ((f"row {number}", {"number": number}) for number in numbers)


def _load(name: str, row: dict) -> Item:
    return Item(torch.full((3, 2, 2), float(row["number"])), f"item {row['number']}")


def _numbers(*sizes: int, load=_load, **options) -> StreamBatches:
    """Files of as many rows; the rows are numbered through."""
    ends = list(itertools.accumulate(sizes))
    files = [partial(_file, range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    settings = {"batch_size": 4, "seed": 0, "shuffle_buffer": 5, **options}
    return StreamBatches(files, load, class_names=None, fingerprint="numbers", **settings)


def _values(batches: list[Batch]) -> list[int]:
    return [int(image[0, 0, 0]) for batch in batches for image in batch.images]


def _same(one: Batch, other: Batch) -> bool:
    tensors = ("images", "positions", "indices")
    facts = ("condition", "bad", "dropped", "cursor")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors) and all(
        getattr(one, name) == getattr(other, name) for name in facts
    )


def _troublesome(name: str, row: dict) -> Item:
    if row["number"] % 5 == 0:
        raise Dropped(f"{name}: no caption")
    if row["number"] % 7 == 0:
        raise BadImage(f"{name}: unreadable image (junk)")
    return _load(name, row)


def test_the_order_never_changes() -> None:
    """Runs resume on other machines and with other library versions: these numbers are part of the format."""
    assert _values(list(islice(_numbers(6, 6, seed=0).from_cursor(0), 3))) == [3, 2, 1, 6, 8, 5, 7, 9, 11, 4, 10, 0]


def test_every_row_comes_once_an_epoch_in_a_new_order() -> None:
    values = _values(list(islice(_numbers(7, 0, 5).from_cursor(0), 9)))
    epochs = [values[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    other = _values(list(islice(_numbers(7, 0, 5, seed=1).from_cursor(0), 3)))
    assert other != epochs[0]


def test_the_buffer_bounds_how_far_rows_move_ahead() -> None:
    def first(size: int) -> list[int]:
        return _values(list(islice(_numbers(40, shuffle_buffer=size).from_cursor(0), 10)))

    assert first(1) == list(range(40))
    assert all(value < place + 6 for place, value in enumerate(first(6)))
    assert first(6) != first(1)


@pytest.mark.parametrize("cursor_of", [0, 1, 5, 13])
@pytest.mark.parametrize("workers", [0, 3])
def test_exact_continuation_in_this_and_later_epochs(cursor_of: int, workers: int) -> None:
    numbers = partial(_numbers, 9, 4, 8, load=_troublesome, max_bad_fraction=1)
    whole = list(islice(numbers().from_cursor(0), 20))
    resumed = islice(numbers(workers=workers).from_cursor(whole[cursor_of].cursor), 6)
    assert all(_same(*pair) for pair in zip(resumed, whole[cursor_of + 1 : cursor_of + 7], strict=True))
    assert whole[13].cursor > 42  # of the third epoch


def test_a_continuation_reads_at_most_an_epoch_and_a_part() -> None:
    opened = []

    def file() -> Iterator[Row]:
        opened.append(1)
        return _file(range(10))

    stream = StreamBatches(
        [file], _load, class_names=None, fingerprint="", shuffle_buffer=4, batch_size=5, seed=0, rank=0
    )
    whole = list(islice(stream.from_cursor(0), 200))
    opened.clear()
    assert _same(next(stream.from_cursor(whole[190].cursor)), whole[191])
    assert len(opened) == 2


@pytest.mark.parametrize(
    ("sizes", "world_size"), [((6, 5, 7, 6), 2), ((6, 5, 7), 2), ((11,), 3), ((4,) * 6, 3), ((1,) * 65, 2)]
)
def test_ranks_partition_the_rows(sizes: tuple[int, ...], world_size: int) -> None:
    """By files where their number allows it, by rows elsewhere; each epoch again."""
    total, seen, indices = sum(sizes), [], []
    for rank in range(world_size):
        stream = _numbers(*sizes, batch_size=world_size, rank=rank, world_size=world_size)
        by_files = len(sizes) % world_size == 0 or len(sizes) == 65
        rows = sum(sizes[rank::world_size]) if by_files else len(range(rank, total, world_size))
        batches = list(islice(stream.from_cursor(0), 2 * rows))
        assert all(batch.positions.tolist() == [rank] for batch in batches)
        first, second = _values(batches[:rows]), _values(batches[rows:])
        seen.append((first, second))
        indices += [int(batch.indices) for batch in batches[:rows]]
    for epoch in range(2):
        assert sorted(value for epochs in seen for value in epochs[epoch]) == list(range(total))
    assert len(set(indices)) == total


def test_what_each_process_saved_is_given_back() -> None:
    stream = _numbers(6, 6, rank=1, world_size=2)
    assert stream.cursor_at(0, []) == 0
    assert stream.cursor_at(10, [40, 43]) == 43
    message = "continues only with the same number of processes: it had 3, this is 2"
    with pytest.raises(VarpiError, match=message):
        stream.cursor_at(10, [40, 43, 41])


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(workers: int) -> None:
    numbers = partial(_numbers, 9, 4, 8, load=_troublesome, max_bad_fraction=1)
    plain, threaded = numbers(), numbers(workers=workers)
    pairs = zip(plain.from_cursor(0), threaded.from_cursor(0), strict=True)
    assert all(_same(*pair) for pair in islice(pairs, 15))
    assert (plain.seen, plain.bad, plain.dropped) == (threaded.seen, threaded.bad, threaded.dropped)


def test_drops_and_unreadable_rows_are_counted_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    stream = _numbers(35, load=_troublesome, batch_size=8, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING, logger="varpi.data"):
        batches = list(islice(stream.from_cursor(0), 3))
    assert sorted(_values(batches)) == [number for number in range(35) if number % 5 and number % 7]
    rows = batches[-1].cursor
    assert sum(batch.bad for batch in batches) == stream.bad <= 4  # 7, 14, 21, 28
    assert sum(batch.dropped for batch in batches) == stream.dropped <= 7
    assert stream.seen == rows == 24 + stream.bad + stream.dropped >= 33
    assert f"left out {1} of" in caplog.text
    assert "replaced 1 unreadable" in caplog.text


def test_too_many_unreadable_rows_stop_the_run() -> None:
    stream = _numbers(35, load=_troublesome, max_bad_fraction=0.05)
    with pytest.raises(VarpiError, match=r"too many unreadable images: .*0\.05; the last was row \d+: unreadable"):
        list(islice(stream.from_cursor(0), 20))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_train_on_stops_the_run(workers: int) -> None:
    def load(name: str, row: dict) -> Item:
        raise (Dropped if kind == "dropped" else BadImage)(f"{name}: trouble")

    kind = "dropped"
    stream = _numbers(30, load=load, workers=workers, max_bad_fraction=1)
    with pytest.raises(
        VarpiError, match=r"1000 rows in a row cannot be trained on: 1000 of 1000 left .*: trouble; see"
    ):
        next(stream.from_cursor(0))
    kind = "unreadable"
    with pytest.raises(VarpiError, match=r"too many unreadable images: 1000 of 1000 .*: trouble"):
        next(_numbers(30, load=load, workers=workers, max_bad_fraction=1).from_cursor(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "batch_size is 5; it must be a positive multiple of 2"),
        ({"rank": 2, "world_size": 2}, r"rank is 2; it must be in \[0, 2\)"),
        ({"workers": -1}, "workers is -1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0; it must be at least 1"),
        ({"max_bad_fraction": 2}, "max_bad_fraction is 2"),
    ],
)
def test_contradictions_are_refused(options: dict, message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        _numbers(5, **options)
    with pytest.raises(VarpiError, match="the stream has no files"):
        _numbers()
    with pytest.raises(VarpiError, match="too few rows for 2 processes"):
        next(_numbers(1, rank=1, world_size=2, batch_size=2).from_cursor(0))


def test_files_that_cannot_be_dealt_out_are_read_by_all_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="varpi.data"):
        for rank in range(2):
            _numbers(3, 3, 3, rank=rank, world_size=2)
            _numbers(3, 3, rank=rank, world_size=2)
            _numbers(*[1] * 65, rank=rank, world_size=2)
    assert [record.getMessage() for record in caplog.records] == [
        "3 files cannot be dealt out to 2 processes: each reads all of them and keeps one row in 2"
    ]


def _open(source: object, **options) -> StreamBatches:
    return StreamBatches.open(
        str(source), **{"image_size": 16, "batch_size": 4, "seed": 0, "shuffle_buffer": 5, **options}
    )


def _parquet(path: Path, reds: range) -> Path:
    images = [{"bytes": png(red), "path": f"{red}.png"} for red in reds]
    captions = [None if red % 4 == 3 else f"red {red}" for red in reds]
    columns = {"image": images, "original": captions, "detail": [f"long {red}" for red in reds]}
    pq.write_table(pa.table({**columns, "label": [1] * len(reds)}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_files_on_disk(form: str, tmp_path: Path) -> None:
    for number, reds in enumerate([range(5), range(5, 12)]):
        (_parquet if form == "parquet" else write_shard)(tmp_path / f"{number}.{form}", reds)
    options = {"caption_column": ["original", "detail"]} if form == "parquet" else {}
    whole = list(islice(_open(tmp_path, **options).from_cursor(0), 9))
    for epoch in (whole[:3], whole[3:6], whole[6:]):
        assert sorted(red_of(image) for batch in epoch for image in batch.images) == list(range(12))
    for batch in whole:
        for image, caption in zip(batch.images, batch.condition, strict=True):
            red = red_of(image)
            assert caption == (f"long {red}" if form == "parquet" and red % 4 == 3 else f"red {red}")
    stream = _open(f"{tmp_path}/*.{form}", **options, workers=2)
    assert stream.num_classes is None
    assert all(_same(*pair) for pair in zip(islice(stream.from_cursor(whole[4].cursor), 4), whole[5:], strict=True))
    parts = [_open(tmp_path, **options, rank=rank, world_size=2).from_cursor(0) for rank in range(2)]
    firsts = [[red_of(image) for batch in islice(part, 2) for image in batch.images] for part in parts]
    assert set(firsts[0]) <= set(range(5))
    assert set(firsts[1]) <= set(range(5, 12))


def test_rows_without_captions_and_small_images_are_dropped(tmp_path: Path) -> None:
    stream = _open(_parquet(tmp_path / "a.parquet", range(16)), caption_column="original")
    batches = list(islice(stream.from_cursor(0), 3))
    assert {red_of(image) for batch in batches for image in batch.images} == {red for red in range(16) if red % 4 < 3}
    assert stream.dropped == sum(batch.dropped for batch in batches) >= 3
    members = {}
    for red in range(8):
        members |= {f"{red}.png": png(red, (40, 16 - red % 2)), f"{red}.txt": b"text"}
    write_tar(tmp_path / "a.tar", members)
    batch = next(_open(tmp_path / "a.tar").from_cursor(0))
    assert sorted(red_of(image) for image in batch.images) == [0, 2, 4, 6]
    batch = next(_open(tmp_path / "a.tar", min_side=0, batch_size=8).from_cursor(0))
    assert sorted(red_of(image) for image in batch.images) == list(range(8))


def test_classes_by_name(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    images = [{"bytes": png(red), "path": None} for red in range(8)]
    labels = [red % 3 for red in range(8)]
    rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    stream = _open(tmp_path / "a.parquet")
    batch = next(stream.from_cursor(0))
    assert (stream.num_classes, batch.condition.dtype) == (3, torch.int64)
    assert batch.condition.tolist() == [red_of(image) % 3 for image in batch.images]


def test_the_hub_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _parquet(tmp_path / "a.parquet", range(8))
    asked, original = [], datasets.load_dataset

    def load_dataset(name: str, **options):
        asked.append((name, options))
        return original("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)

    def dataset_info(self, name: str, *, revision: str | None) -> huggingface_hub.DatasetInfo:
        return huggingface_hub.DatasetInfo(id=name, sha=f"sha of {revision}", downloads=0, likes=0, tags=[])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    stream = _open("org/photos@v1", caption_column="detail")
    assert asked == [("org/photos", {"split": "train", "revision": "sha of v1", "streaming": True})]
    assert next(stream.from_cursor(0)).condition[0].startswith("long ")
    assert stream.fingerprint == _open("org/photos@v1", caption_column="detail").fingerprint
    assert stream.fingerprint != _open("org/photos", caption_column="detail").fingerprint

    def unreachable(self, name: str, *, revision: str | None) -> None:
        raise ConnectionError("cannot reach the Hub\nat all")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(VarpiError, match=r"org/photos: no such path here, and not .*\(cannot reach the Hub\)$"):
        _open("org/photos", caption_column="detail")


def test_the_first_rows_of_a_stream(tmp_path: Path) -> None:
    for split, reds in (("train", range(100, 120)), ("validation", range(8))):
        _parquet(tmp_path / f"{split}-0.parquet", reds)
    asked = {"image_size": 16, "split": "validation", "caption_column": "original"}
    first = FirstRows(tmp_path, 5, **asked)
    assert len(first) == 5
    assert [red_of(first[index].image) for index in (0, 2)] == [0, 2]
    assert first[1].condition == "red 1"
    assert first.name(1).endswith("file 0 row 1")
    with pytest.raises(Dropped, match="no caption in original"):
        first[3]
    assert len(FirstRows(tmp_path, 50, **asked)) == 8
    with pytest.raises(VarpiError, match="split"):
        FirstRows(tmp_path, 5, **{**asked, "split": "test"})


def test_held_out_images_of_a_stream_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is prepared for random access, which would fetch the training images too."""
    for split in ("train", "validation"):
        _parquet(tmp_path / f"{split}-0.parquet", range(8))
    data = {"source": str(tmp_path), "image_size": 16, "caption_column": "detail", "stream": True}
    values: Any = yaml.safe_load((importlib.resources.files("varpi.recipes") / "janus-pro-1b.yaml").read_text())
    recipe = parse_recipe({**values, "data": data})
    original = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: k["streaming"] and original(*a, **k))
    held_out = open_held_out(recipe, "validation", _open(tmp_path, caption_column="detail"), 3)
    assert [held_out[index].condition for index in range(3)] == ["long 0", "long 1", "long 2"]

    recipe = parse_recipe({**values, "data": {**data, "source": "org/photos"}})
    with pytest.raises(
        VarpiError, match=r"org/photos is streamed; say how many images of split 'validation' are to be"
    ):
        open_held_out(recipe, "validation", _open(tmp_path, caption_column="detail"), None)


def test_fingerprint_of_files(tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", range(2))
    assert _open(tmp_path).fingerprint == _open(f"{tmp_path}/{{0,1}}.tar").fingerprint
    assert _open(tmp_path).fingerprint != _open(tmp_path / "0.tar").fingerprint
    before = _open(tmp_path).fingerprint
    write_shard(tmp_path / "1.tar", range(20))
    assert _open(tmp_path).fingerprint != before


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("digits", {}, "digits: only parquet files, tar shards and the Hub are streamed; leave out stream"),
        ("{}/a.parquet", {}, r"a\.parquet\[train\]: column 'label' does not name its classes \(ClassLabel\)"),
        ("{}/a.parquet", {"min_side": 8}, "min_side is for captioned images"),
        (
            "{}/a.parquet",
            {"caption_column": "text"},
            r"no column 'text'; set caption_column .*\(image, original, d",
        ),
        ("{}/a.parquet", {"image_column": "jpg"}, "no column 'jpg'; set image_column"),
        (
            "{}/a.parquet",
            {"image_column": "label", "caption_column": "detail"},
            "column 'label' holds int64; exp",
        ),
        ("{}/a.parquet", {"caption_column": "text", "label_column": "class"}, "are both given"),
        ("{}/a.parquet", {"split": "test", "caption_column": "detail"}, "no split 'test'"),
        ("{}/junk.parquet", {"caption_column": "detail"}, r"junk\.parquet: cannot be read as parquet"),
        ("{}/cut.tar", {}, r"cut\.tar: does not end as a tar archive does"),
        ("{}/a.parquet", {"image_size": 0}, "image_size is 0"),
    ],
)
def test_sources_that_are_refused(source: str, options: dict, message: str, tmp_path: Path) -> None:
    _parquet(tmp_path / "a.parquet", range(2))
    (tmp_path / "junk.parquet").write_bytes(b"junk" * 9)
    (tmp_path / "cut.tar").write_bytes(write_shard(tmp_path / "b.tar", range(2)).read_bytes()[:1100])
    with pytest.raises(VarpiError, match=message) as caught:
        _open(source.format(tmp_path), **options)
    assert "\n" not in str(caught.value)


def test_a_file_that_breaks_in_the_middle(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", range(12))
    stream = _open(path, caption_column="detail")
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    with pytest.raises(VarpiError, match=r"a\.parquet\[train\]: file 0 cannot be read on \("):
        list(islice(stream.from_cursor(0), 3))


PROGRAM = """
import sys
from varpi.data.stream import StreamBatches

def stream(workers):
    options = {"caption_column": "detail", "image_size": 16, "batch_size": 4, "seed": 0, "shuffle_buffer": 2}
    return StreamBatches.open(sys.argv[1], workers=workers, **options).from_cursor(0)

plain, threaded = stream(0), stream(2)  # held by globals, as in a careless script
next(plain)
next(threaded)
print("done")
sys.exit(3)
"""


def test_a_program_ends_in_the_middle_of_its_streams(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", range(40))
    command = [sys.executable, "-c", PROGRAM, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, "done\n", "")


def _lanes(world_size: int, rank: int = 0, lanes: int = 4) -> Lanes:
    """Of 3 files, which are not dealt out, and 8 images a batch."""

    def lane(number: int, count: int) -> StreamBatches:
        return _numbers(9, 7, 11, load=_troublesome, max_bad_fraction=1, batch_size=8, rank=number, world_size=count)

    return Lanes(lane, lanes, rank=rank, world_size=world_size)


def test_lanes_read_the_same_in_any_number_of_processes() -> None:
    whole = list(islice(_lanes(1).from_cursor(0), 6))
    for world_size in (2, 4):
        parts = [list(islice(_lanes(world_size, rank).from_cursor(0), 6)) for rank in range(world_size)]
        for number, batch in enumerate(whole):
            shares = [part[number] for part in parts]
            assert torch.equal(batch.images, torch.cat([share.images for share in shares]))
            assert batch.condition == [caption for share in shares for caption in share.condition]
            assert batch.positions.tolist() == [place for share in shares for place in share.positions.tolist()]
            assert batch.positions.tolist() == [*range(8)]
            assert (batch.bad, batch.dropped) == tuple(
                sum(getattr(share, name) for share in shares) for name in ("bad", "dropped")
            )


def test_lanes_go_on_in_another_number_of_processes() -> None:
    whole = list(islice(_lanes(1).from_cursor(0), 9))
    four = [next(islice(_lanes(4, rank).from_cursor(0), 2, None)) for rank in range(4)]
    saved = [place for batch in four for place in batch.cursor]  # as a checkpoint has them
    assert len(saved) == 4
    two = []
    for rank in range(2):
        lanes = _lanes(2, rank)
        two.append(list(islice(lanes.from_cursor(lanes.cursor_at(3, saved)), 3)))
    for number in range(3):
        assert torch.equal(whole[3 + number].images, torch.cat([part[number].images for part in two]))
    one = _lanes(1)
    saved = [place for part in two for place in part[-1].cursor]
    assert all(map(_same, islice(one.from_cursor(one.cursor_at(6, saved)), 3), whole[6:]))


def test_lanes_that_do_not_fit() -> None:
    with pytest.raises(VarpiError, match=r"data\.lanes is 4; it must be a multiple of 3 processes"):
        _lanes(3)
    with pytest.raises(VarpiError, match=r"saved with 2 cursors of its stream; data\.lanes is 4"):
        _lanes(1).cursor_at(3, [5, 6])
    assert _lanes(2, 1).cursor_at(0, []) == (0, 0)


def test_lanes_count_together() -> None:
    lanes = _lanes(2, 0)
    list(islice(lanes.from_cursor(0), 3))
    assert lanes.seen == 12 + len(lanes.left_out) > 12
    lanes.seen, lanes.left_out = 5, type(lanes.left_out)({"x": (2, "y")})
    assert (lanes.seen, lanes.left_out.found) == (5, {"x": (2, "y")})
