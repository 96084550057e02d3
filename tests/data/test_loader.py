import logging
import multiprocessing
import subprocess
import sys
from itertools import islice, pairwise
from typing import Any

import pytest
import torch

from varpi.data import BadImage, Batch, Batches, Dropped, Item, open_dataset
from varpi.data.loader import collate_conditions
from varpi.errors import VarpiError


class Numbers:
    """A dataset whose image i is filled with i; those in `broken` cannot be read."""

    num_classes = 3
    class_names = None
    fingerprint = "numbers"

    def __init__(self, size: int, broken: frozenset[int] = frozenset()) -> None:
        self._size = size
        self._broken = broken

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Item:
        if index in self._broken:
            raise BadImage(f"{index}.jpg: unreadable image (junk)")
        return Item(torch.full((3, 2, 2), float(index)), index % 3)


def _same(one: Batch, other: Batch) -> bool:
    names = ("images", "condition", "positions", "indices")
    return one.bad == other.bad and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_a_batch_holds_what_it_says() -> None:
    batch = Batches(Numbers(100), batch_size=6, seed=1, rank=1, world_size=2).at(3)
    assert batch.images.shape == (3, 3, 2, 2)
    assert batch.positions.tolist() == [3, 4, 5]
    assert batch.images[:, 0, 0, 0].tolist() == batch.indices.tolist()
    assert batch.condition.tolist() == [index % 3 for index in batch.indices.tolist()]
    assert batch.condition.dtype == batch.indices.dtype == batch.positions.dtype == torch.int64
    assert batch.bad == 0


def test_the_order_never_changes() -> None:
    """Runs resume on other machines and with other library versions: these numbers are part of the format."""
    assert Batches(Numbers(50), batch_size=8, seed=0).at(0).indices.tolist() == [0, 43, 38, 21, 2, 11, 20, 17]


def test_every_epoch_is_a_new_permutation_and_they_chain() -> None:
    batches = Batches(Numbers(10), batch_size=4, seed=0)
    chain = torch.cat([batches.at(step).indices for step in range(10)]).tolist()
    epochs = [chain[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_differ() -> None:
    first, second = (Batches(Numbers(100), batch_size=16, seed=seed).at(0) for seed in (0, 1))
    assert first.indices.tolist() != second.indices.tolist()


def test_a_dataset_smaller_than_the_batch() -> None:
    indices = Batches(Numbers(3), batch_size=8, seed=0).at(5).indices.tolist()
    assert len(indices) == 8
    assert all(2 <= indices.count(number) <= 4 for number in range(3))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch_without_overlap(world_size: int) -> None:
    numbers = Numbers(21, broken=frozenset({4, 9}))
    whole = Batches(numbers, batch_size=8, seed=3, max_bad_fraction=0.5)
    parts = [
        Batches(numbers, batch_size=8, seed=3, rank=rank, world_size=world_size, max_bad_fraction=0.5)
        for rank in range(world_size)
    ]
    for step in range(6):
        expected = whole.at(step)
        found = [part.at(step) for part in parts]
        for name in ("images", "condition", "positions", "indices"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in found]), getattr(expected, name))
        assert sum(batch.bad for batch in found) == expected.bad


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_resuming_change_nothing(workers: int) -> None:
    numbers = Numbers(13, broken=frozenset({2}))
    plain = Batches(numbers, batch_size=4, seed=0, max_bad_fraction=0.5)
    expected = [plain.at(step) for step in range(9)]
    batches = Batches(numbers, batch_size=4, seed=0, workers=workers, max_bad_fraction=0.5)
    whole = list(islice(batches.from_step(0), 9))
    assert all(_same(*pair) for pair in zip(whole, expected, strict=True))
    assert (batches.seen, batches.bad) == (plain.seen, plain.bad)
    resumed = list(islice(batches.from_step(5), 4))
    assert all(_same(*pair) for pair in zip(resumed, expected[5:], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_global_generator(workers: int) -> None:
    before = torch.get_rng_state()
    next(Batches(Numbers(13), batch_size=4, seed=0, workers=workers).from_step(0))
    assert torch.equal(before, torch.get_rng_state())


def test_digits_through_workers() -> None:
    batches = Batches(open_dataset("digits", image_size=32), batch_size=16, seed=0, workers=2)
    for step, batch in zip((40, 41, 42), batches.from_step(40), strict=False):
        assert _same(batch, batches.at(step))


def test_unreadable_images_are_replaced_counted_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    broken = frozenset({0, 5})
    batches = Batches(Numbers(40, broken), batch_size=10, seed=0, max_bad_fraction=0.2)
    plain = Batches(Numbers(40), batch_size=10, seed=0)
    bad, last = 0, ""
    with caplog.at_level(logging.WARNING, logger="varpi.data"):
        for step in range(12):
            batch, wanted = batches.at(step), plain.at(step).indices
            kept = torch.tensor([index not in broken for index in wanted.tolist()])
            assert torch.equal(batch.indices[kept], wanted[kept])
            assert not broken & set(batch.indices.tolist())
            assert batch.bad >= int((~kept).sum())
            bad += batch.bad
            last = f"{bad} of {batches.seen} images opened so far" if batch.bad else last
    assert bad == batches.bad >= 6  # twice in each of three epochs
    assert batches.seen == 120 + bad
    assert last in caplog.text
    assert ".jpg: unreadable image (junk)" in caplog.text


def test_substitutes_depend_on_seed_and_step_alone() -> None:
    numbers = Numbers(30, frozenset(range(0, 30, 3)))
    one, other = (Batches(numbers, batch_size=10, seed=0, max_bad_fraction=1) for _ in range(2))
    backwards = {step: one.at(step) for step in (5, 4, 3, 2, 1, 0)}
    assert all(_same(backwards[step], other.at(step)) for step in range(6))


def test_a_worker_that_dies_while_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks before torch sees that the worker is gone."""

    class Broken(torch.utils.data.DataLoader):
        def __iter__(self) -> Any:
            raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("varpi.data.loader.DataLoader", Broken)
    with pytest.raises(RuntimeError, match=r"a DataLoader worker broke off: .*Connection reset by peer"):
        next(Batches(Numbers(10), batch_size=4, seed=0, workers=1).from_step(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run(workers: int) -> None:
    numbers = Numbers(100, frozenset(range(0, 100, 10)))
    batches = Batches(numbers, batch_size=10, seed=0, workers=workers, max_bad_fraction=0.05)
    with pytest.raises(
        VarpiError, match=r"too many unreadable images: \d+ of \d+ .*0\.05; the last was \d+\.jpg: unr"
    ) as e:
        list(islice(batches.from_step(0), 20))
    assert "\n" not in str(e.value)
    assert batches.seen >= 20


def test_one_early_failure_does_not_stop_the_run() -> None:
    numbers = Numbers(100, frozenset({66}))  # the very first
    batches = Batches(numbers, batch_size=4, seed=0, max_bad_fraction=0.1)
    assert sum(batches.at(step).bad for step in range(25)) >= 1
    unforgiving = Batches(numbers, batch_size=4, seed=0, max_bad_fraction=0.0)
    with pytest.raises(VarpiError, match="max_bad_fraction is 0; the last was 66"):
        [unforgiving.at(step) for step in range(50)]


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_stops_even_the_tolerant(workers: int) -> None:
    batches = Batches(Numbers(5, frozenset(range(5))), batch_size=2, seed=0, workers=workers, max_bad_fraction=1)
    with pytest.raises(VarpiError, match="1000 of 1000 images"):
        next(batches.from_step(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, "batch_size is 5; it must be a positive multiple of 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, r"rank is 2; it must be in \[0, 2\)"),
        ({"workers": -1}, "workers is -1"),
        ({"max_bad_fraction": 1.5}, "max_bad_fraction is 1.5"),
    ],
)
def test_contradictions_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        Batches(Numbers(9), **{"batch_size": 4, "seed": 0, **arguments})
    with pytest.raises(VarpiError, match="dataset is empty"):
        Batches(Numbers(0), batch_size=4, seed=0)


class Captions:
    """A dataset whose item i has the caption "item i", or features of i + 1 rows; those in `gone` are left out."""

    num_classes = None
    class_names = None
    fingerprint = "captions"

    def __init__(self, size: int, gone: frozenset[int] = frozenset(), *, features: bool = False) -> None:
        self._size = size
        self._gone = gone
        self._features = features

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Item:
        if index in self._gone:
            raise Dropped(f"{index}.jpg: no caption")
        condition = torch.full((index + 1, 2), float(index)) if self._features else f"item {index}"
        return Item(torch.full((3, 2, 2), float(index)), condition)


def test_conditions_of_each_kind() -> None:
    classes = collate_conditions([3, 1])
    assert isinstance(classes, torch.Tensor)
    assert (classes.dtype, classes.tolist()) == (torch.int64, [3, 1])
    assert collate_conditions(["a", "b"]) == ["a", "b"]
    features = [torch.zeros(2, 4), torch.zeros(5, 4)]
    assert all(one is other for one, other in zip(collate_conditions(features), features, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_captions_and_features(workers: int) -> None:
    for batch in islice(Batches(Captions(9), batch_size=4, seed=0, workers=workers).from_step(1), 3):
        assert batch.condition == [f"item {index}" for index in batch.indices.tolist()]
    batches = Batches(Captions(9, features=True), batch_size=4, seed=0, workers=workers)
    for batch in islice(batches.from_step(1), 3):
        assert isinstance(batch.condition, list)
        for features, index in zip(batch.condition, batch.indices.tolist(), strict=True):
            assert torch.equal(features, torch.full((index + 1, 2), float(index)))


def test_cursors_are_the_numbers_of_the_next_batches() -> None:
    batches = Batches(Numbers(10), batch_size=4, seed=0)
    first, second = islice(batches.from_cursor(3), 2)
    assert (first.cursor, second.cursor) == (4, 5)
    assert _same(next(batches.from_cursor(first.cursor)), second)
    assert batches.cursor_at(7, [3, 4]) == 7
    assert (batches.num_classes, batches.fingerprint) == (3, "numbers")


@pytest.mark.parametrize("workers", [0, 2])
def test_items_left_out_are_replaced_and_counted_apart(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    gone = frozenset(range(0, 40, 2))
    batches = Batches(Captions(40, gone), batch_size=10, seed=0, workers=workers, max_bad_fraction=0)
    plain = Batches(Captions(40), batch_size=10, seed=0)
    dropped = 0
    with caplog.at_level(logging.WARNING, logger="varpi.data"):
        for step, batch in zip(range(12), batches.from_step(0), strict=False):
            wanted = plain.at(step).indices
            kept = wanted % 2 == 1
            assert torch.equal(batch.indices[kept], wanted[kept])
            assert not gone & set(batch.indices.tolist())
            dropped += batch.dropped
            assert (batch.bad, batches.bad, batches.dropped) == (0, 0, dropped)
    assert dropped >= 60  # twenty in each of three epochs
    assert batches.seen == 120 + dropped
    counts = [int(record.getMessage().split()[2]) for record in caplog.records]
    assert all(later >= 2 ** (earlier.bit_length()) for earlier, later in pairwise(counts))
    assert counts[0] <= 10
    assert counts[-1] >= 64
    assert caplog.records[0].getMessage().endswith(".jpg: no caption")


def test_items_left_out_do_not_hide_unreadable_ones() -> None:
    class Both(Captions):
        def __getitem__(self, index: int) -> Item:
            if index % 10 == 0:
                raise BadImage(f"{index}.jpg: unreadable image (junk)")
            return super().__getitem__(index)

    batches = Batches(Both(100, frozenset(range(1, 100, 2))), batch_size=10, seed=0, max_bad_fraction=0.15)
    with pytest.raises(VarpiError, match=r"too many unreadable images: \d+ of \d+ images .*the last was \d*0\.jpg"):
        [batches.at(step) for step in range(40)]  # 10 of 50
    assert batches.bad / (batches.seen - batches.dropped) > 0.15
    assert batches.bad / batches.seen < 0.15


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_train_on_stops_the_run(workers: int) -> None:
    batches = Batches(Captions(5, frozenset(range(5))), batch_size=2, seed=0, workers=workers)
    message = (
        r"1000 items in a row cannot be trained on: 1000 of 1000 left out so far, the last was \d\.jpg: no caption; see"
    )
    with pytest.raises(VarpiError, match=message):
        next(batches.from_step(0))


PROGRAM = """
import os, signal, sys, time
from multiprocessing import active_children
from varpi.data import Batches, open_dataset

batches = Batches(open_dataset("digits", image_size=32), batch_size=64, seed=0, workers=2)
stream = batches.from_step(0)  # held by a global, as in a careless script
next(stream)
if "signals" in sys.argv:
    for worker in active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    time.sleep(0.2)
    for _ in range(20):
        next(stream)
print("done")
sys.exit(3)
"""


@pytest.mark.parametrize("arguments", [[], ["signals"]])
def test_a_program_ends_with_its_workers_still_busy(arguments: list[str]) -> None:
    """The workers also outlive the signals that a scheduler sends to every process of a job."""
    command = [sys.executable, "-W", "ignore:This DataLoader will create", "-c", PROGRAM, *arguments]  # on one core
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, "done\n", "")


def _fail_in_the_middle() -> None:
    stream = Batches(Numbers(50), batch_size=8, seed=0, workers=2).from_step(0)
    next(stream)
    raise RuntimeError("the traceback holds the stream")


def test_a_child_process_that_fails_ends_with_its_workers() -> None:
    child = multiprocessing.get_context("fork").Process(target=_fail_in_the_middle)
    child.start()
    child.join(timeout=60)
    code = child.exitcode
    child.kill()
    child.join()
    assert code == 1
