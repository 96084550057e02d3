"""Batches as a pure function of (seed, step): what makes a run resumable, shardable and repeatable.

The images are an endless chain of permutations of the dataset, one per epoch; global batch `step` is the `step`-th
slice of that chain, and each rank holds a contiguous part of the slice. Nothing is remembered between steps, so to
resume is to ask for the next step.
"""

import atexit
import itertools
import logging
import signal
import weakref
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from varpi.data.caption_check import CaptionCheck, checked
from varpi.data.dataset import UNREADABLE, BadImage, Dataset, Dropped, Item
from varpi.data.left_out import LeftOut
from varpi.errors import VarpiError
from varpi.runtime.randomness import Stream, permutation, words

logger = logging.getLogger(__name__)

# Items tried for one place, as many as a stream passes over. Past this, nearly nothing can be used.
_MAX_ATTEMPTS = 1000
# No verdict on the share of unreadable images before this many were opened
_MIN_SEEN = 20


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch, of b images."""

    images: Tensor
    """float32 (b, 3, S, S) in [-1, 1]."""
    condition: Tensor | list[str] | list[Tensor]
    """int64 (b,) class ids, b captions, or the features of b captions: float (L, C) each, valid tokens only."""
    positions: Tensor
    """int64 (b,) place within the global batch, in [0, batch_size): the key for random draws."""
    indices: Tensor
    """int64 (b,) index in the dataset of the image that was really loaded."""
    bad: int
    """Unreadable images that had to be replaced."""
    dropped: int = 0
    """Items left out on purpose that had to be replaced."""
    captions: list[str] | None = None
    """The b captions that `condition` was made from; None where it was made from something else."""
    cursor: int | tuple[int, ...] = 0
    """What to give `from_cursor` to go on with the batch after this one."""


def collate_conditions(conditions: Sequence[int | str | Tensor]) -> Tensor | list[Any]:
    """The conditions of b items as `Batch.condition` holds them.

    Class ids become int64 (b,); captions, and the features of captions, a list.
    """
    if isinstance(conditions[0], int):
        return torch.tensor(conditions, dtype=torch.int64)
    return list(conditions)


class Counts:
    """How many items were looked at and not used; warns of them, and stops the run at too many unreadable ones."""

    def __init__(self, max_bad_fraction: float) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise VarpiError(f"max_bad_fraction is {max_bad_fraction}; it must be in [0, 1]")
        self._max_bad_fraction = max_bad_fraction
        self.seen = 0
        """Items looked at so far, unusable ones included."""
        self.left_out = LeftOut()
        """Those that could not be used, or were left out on purpose."""

    @property
    def bad(self) -> int:
        """Unreadable images so far."""
        return self.left_out.count(UNREADABLE)

    @property
    def dropped(self) -> int:
        """Items left out on purpose so far, for their captions, or for too small an image."""
        return len(self.left_out) - self.bad

    def count(self, seen: int, unusable: Sequence[tuple[str, str]], stuck: str | None = None) -> None:
        """Add `seen` items, some of them `unusable`: by what reason, and the message.

        stuck: why the run cannot go on, if it cannot.

        Raises:
            VarpiError: it cannot go on, or too many images were unreadable.
        """
        before = self.dropped
        self.seen += seen
        for reason, message in unusable:
            self.left_out.add(reason, message)
        failures = [message for reason, message in unusable if reason == UNREADABLE]
        drops = [message for reason, message in unusable if reason != UNREADABLE]
        opened = self.seen - self.dropped
        share = self.bad / max(opened, 1)
        so_far = f"{self.bad} of {opened} images opened so far ({share:.1%})"
        if failures and (stuck == UNREADABLE or (opened >= _MIN_SEEN and share > self._max_bad_fraction)):
            raise VarpiError(
                f"too many unreadable images: {so_far}, max_bad_fraction is {self._max_bad_fraction:g}; "
                f"the last was {failures[-1]}"
            )
        if stuck is not None:
            raise VarpiError(
                f"{stuck}: {self.dropped} of {self.seen} left out so far, the last was {drops[-1]}; see "
                "data.caption_column and data.min_side"
            )
        if failures:
            logger.warning("replaced %d unreadable: %s; the last was %s", len(failures), so_far, failures[-1])
        if self.dropped.bit_length() > before.bit_length():
            logger.warning("left out %d of %d items so far; the last was %s", self.dropped, self.seen, drops[-1])


class Batches(Counts):
    """An endless, deterministic stream of batches.

    Args:
        dataset: where the items come from.
        batch_size: images in the global batch, over all ranks; may exceed the dataset.
        seed: of the order.
        rank: this process's number in [0, world_size); it holds positions [rank * b, (rank + 1) * b) of each global
            batch, b = batch_size / world_size.
        world_size: number of processes.
        workers: processes that load ahead; 0 loads in this one. The content is the same.
        max_bad_fraction: share of unreadable images, in [0, 1], beyond which the run stops. Counted by each rank for
            itself, over the images it has opened, once it has opened 20.

    Raises:
        VarpiError: an empty dataset, or arguments that contradict each other.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_bad_fraction: float = 0.01,
    ) -> None:
        if len(dataset) == 0:
            raise VarpiError("the dataset is empty; a batch needs at least one image")
        if batch_size < 1 or batch_size % world_size:
            raise VarpiError(f"batch_size is {batch_size}; it must be a positive multiple of {world_size} processes")
        if not 0 <= rank < world_size:
            raise VarpiError(f"rank is {rank}; it must be in [0, {world_size})")
        if workers < 0:
            raise VarpiError(f"workers is {workers}; it must be >= 0")
        super().__init__(max_bad_fraction)
        local = batch_size // world_size
        self._loader = _StepLoader(dataset, batch_size, seed, range(rank * local, (rank + 1) * local))
        self._dataset = dataset
        self._workers = workers

    @property
    def num_classes(self) -> int | None:
        """Of the dataset: number of classes, or None for captions."""
        return self._dataset.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of the dataset."""
        return self._dataset.class_names

    @property
    def size(self) -> int:
        """Images in the dataset."""
        return len(self._dataset)

    @property
    def fingerprint(self) -> str:
        """Of the dataset."""
        return self._dataset.fingerprint

    def at(self, step: int) -> Batch:
        """The batch of optimizer step `step` >= 0, loaded in this process.

        Raises:
            VarpiError: more than `max_bad_fraction` of the images opened so far were unreadable, or 1000 items in a row
                could not be used.
        """
        return self._checked(self._loader[step])

    def check_captions(self, check: CaptionCheck | None) -> None:
        """Leave out, from the next iterator on, what `check` refuses."""
        self._loader.dataset = checked(self._dataset, check)

    def from_step(self, step: int) -> Generator[Batch, None, None]:
        """Endless iterator over the batches of steps `step`, `step + 1`, …; the workers load ahead.

        Closing the iterator, dropping it or ending the program stops the workers.

        Raises:
            VarpiError: as `at`.
        """
        if self._workers == 0:
            return (self.at(number) for number in itertools.count(step))
        stream = self._prefetched(step)
        close_at_exit(stream)
        return stream

    def _prefetched(self, step: int) -> Generator[Batch, None, None]:
        loader = DataLoader(
            self._loader,
            batch_size=None,
            sampler=_StepsFrom(step),
            num_workers=self._workers,
            generator=torch.Generator(),  # its own: otherwise it would draw from the global one, and change the run
            worker_init_fn=_leave_signals_to_parent,
        )
        try:
            for loaded in loader:
                yield self._checked(loaded)
        except (OSError, EOFError) as error:  # it was killed while it was sending, before torch saw that
            raise RuntimeError(f"a DataLoader worker broke off: {error}") from error

    def from_cursor(self, cursor: int) -> Generator[Batch, None, None]:
        """`from_step`: a cursor is the number of the next batch."""
        return self.from_step(cursor)

    def cursor_at(self, step: int, saved: Sequence[int]) -> int:
        """The cursor of batch `step`; what each process had `saved` is not needed."""
        return step

    def _checked(self, loaded: "_Loaded") -> Batch:
        self.count(loaded.seen, loaded.unusable, loaded.stuck)
        assert loaded.batch is not None
        if loaded.lengths is None:
            return loaded.batch
        assert isinstance(loaded.batch.condition, Tensor)
        return replace(loaded.batch, condition=list(loaded.batch.condition.split(loaded.lengths)))


@dataclass(frozen=True)
class _Loaded:
    """What a worker sends back. Failures travel as data: an exception would arrive wrapped in a traceback."""

    batch: Batch | None
    """None when one place found nothing to hold."""
    seen: int
    unusable: list[tuple[str, str]]
    """By what reason each, and the message."""
    stuck: str | None = None
    lengths: list[int] | None = None
    """Of each caption's features, which come joined: shared memory would take a file handle for every one."""


class _StepLoader(torch.utils.data.Dataset[_Loaded]):
    """Step -> batch, as the map-style dataset that DataLoader's workers hold."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, positions: range) -> None:
        self.dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._positions = positions

    def __getitem__(self, step: int) -> _Loaded:
        items: list[Item] = []
        indices: list[int] = []
        unusable: list[tuple[str, str]] = []
        for position in self._positions:
            for attempt in range(_MAX_ATTEMPTS):
                index = self._index(step, position, attempt)
                try:
                    items.append(self.dataset[index])
                except (BadImage, Dropped) as error:
                    unusable.append((error.reason, str(error)))
                else:
                    indices.append(index)
                    break
            else:
                bad = sum(reason == UNREADABLE for reason, _ in unusable[-_MAX_ATTEMPTS:])
                mostly_bad = bad > _MAX_ATTEMPTS - bad
                stuck = UNREADABLE if mostly_bad else f"{_MAX_ATTEMPTS} items in a row cannot be trained on"
                return _Loaded(None, len(items) + len(unusable), unusable, stuck)
        condition, lengths = collate_conditions([item.condition for item in items]), None
        if isinstance(condition, list) and isinstance(condition[0], Tensor):
            condition, lengths = torch.cat(condition), [len(features) for features in condition]
        batch = Batch(
            images=torch.stack([item.image for item in items]),
            condition=condition,
            positions=torch.tensor(self._positions, dtype=torch.int64),
            indices=torch.tensor(indices, dtype=torch.int64),
            bad=(bad := sum(reason == UNREADABLE for reason, _ in unusable)),
            dropped=len(unusable) - bad,
            cursor=step + 1,
        )
        return _Loaded(batch, len(items) + len(unusable), unusable, lengths=lengths)

    def _index(self, step: int, position: int, attempt: int) -> int:
        """Dataset index for a place in the global batch; attempt 0 is the permutation's own."""
        size = len(self.dataset)
        if attempt > 0:
            return int(words(self._seed, Stream.SUBSTITUTE, (step, position, attempt), 1)[0] % size)
        epoch, offset = divmod(step * self._batch_size + position, size)
        return int(permutation(self._seed, Stream.PERMUTATION, epoch, size)[offset])


class _StepsFrom(Sampler[int]):
    def __init__(self, step: int) -> None:
        self._step = step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._step)


def _leave_signals_to_parent(_worker: int) -> None:
    # Ctrl-C, or a scheduler that stops the job, signals every process of it. The parent must be able to save in peace,
    # and then stops its workers itself; if it dies, they notice.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def close_at_exit(stream: Generator[Any, None, None]) -> None:
    """Have the program close `stream`, and so stop its workers, before it ends.

    It may end while the iterator is still held, say by a traceback. The interpreter would then wait for workers without
    telling them, for ever. So they are told before: by `atexit` in a main process, and in a child of multiprocessing,
    which skips that, by its own finalizers.
    """
    reference = weakref.ref(stream)
    atexit.register(_close, reference)
    Finalize(None, _close, (reference,), exitpriority=20)  # before the queues close, at 10


def _close(reference: "weakref.ref[Generator[Any, None, None]]") -> None:
    if (stream := reference()) is not None:
        stream.close()
