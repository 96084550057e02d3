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
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from varpi.data.dataset import BadImage, Dataset, Item
from varpi.errors import VarpiError

logger = logging.getLogger(__name__)

# Separate streams of one counter-based generator
_PERMUTATION, _SUBSTITUTE = 0, 1
# Substitutes tried for one place. Past this, nearly everything is unreadable.
_MAX_ATTEMPTS = 32
# No verdict on the share of unreadable images before this many were opened
_MIN_SEEN = 20


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch, of b images."""

    images: Tensor
    """float32 (b, 3, S, S) in [-1, 1]."""
    condition: Tensor
    """int64 (b,) class ids."""
    positions: Tensor
    """int64 (b,) place within the global batch, in [0, batch_size): the key for random draws."""
    indices: Tensor
    """int64 (b,) index in the dataset of the image that was really loaded."""
    bad: int
    """Unreadable images that had to be replaced."""


class Batches:
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
        if not 0 <= max_bad_fraction <= 1:
            raise VarpiError(f"max_bad_fraction is {max_bad_fraction}; it must be in [0, 1]")
        local = batch_size // world_size
        self._loader = _StepLoader(dataset, batch_size, seed, range(rank * local, (rank + 1) * local))
        self._workers = workers
        self._max_bad_fraction = max_bad_fraction
        self.seen = 0
        """Images opened so far, unreadable ones included."""
        self.bad = 0
        """Unreadable images among them."""

    def at(self, step: int) -> Batch:
        """The batch of optimizer step `step` >= 0, loaded in this process.

        Raises:
            VarpiError: more than `max_bad_fraction` of the images opened so far were unreadable.
        """
        return self._checked(self._loader[step])

    def from_step(self, step: int) -> Iterator[Batch]:
        """Endless iterator over the batches of steps `step`, `step + 1`, …; the workers load ahead.

        Closing the iterator, dropping it or ending the program stops the workers.

        Raises:
            VarpiError: as `at`.
        """
        if self._workers == 0:
            return map(self.at, itertools.count(step))
        stream = self._prefetched(step)
        # A program may end while the iterator is still held, say by a traceback. The interpreter then waits for the
        # workers without telling them, for ever; so tell them before: `atexit` in a main process, and in a child of
        # multiprocessing, which skips that, its own finalizers.
        reference = weakref.ref(stream)
        atexit.register(_close, reference)
        Finalize(None, _close, (reference,), exitpriority=20)  # before the queues close, at 10
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
        for loaded in loader:
            yield self._checked(loaded)

    def _checked(self, loaded: "_Loaded") -> Batch:
        """Count what failed, warn about it, and stop when it is too much."""
        failures = loaded.failures
        self.seen += loaded.opened
        self.bad += len(failures)
        if failures:
            share = self.bad / self.seen
            so_far = f"{self.bad} of {self.seen} images opened so far ({share:.1%})"
            if loaded.batch is None or (self.seen >= _MIN_SEEN and share > self._max_bad_fraction):
                raise VarpiError(
                    f"too many unreadable images: {so_far}, max_bad_fraction is {self._max_bad_fraction:g}; "
                    f"the last was {failures[-1]}"
                )
            logger.warning("replaced %d unreadable: %s; the last was %s", len(failures), so_far, failures[-1])
        assert loaded.batch is not None
        return loaded.batch


@dataclass(frozen=True)
class _Loaded:
    """What a worker sends back. Failures travel as data: an exception would arrive wrapped in a traceback."""

    batch: Batch | None
    """None when one place found no readable substitute."""
    opened: int
    failures: list[str]


class _StepLoader(torch.utils.data.Dataset[_Loaded]):
    """Step -> batch, as the map-style dataset that DataLoader's workers hold."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, positions: range) -> None:
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._positions = positions

    def __getitem__(self, step: int) -> _Loaded:
        items: list[Item] = []
        indices: list[int] = []
        failures: list[str] = []
        for position in self._positions:
            for attempt in range(_MAX_ATTEMPTS):
                index = self._index(step, position, attempt)
                try:
                    items.append(self._dataset[index])
                except BadImage as error:
                    failures.append(str(error))
                else:
                    indices.append(index)
                    break
            else:
                return _Loaded(None, len(items) + len(failures), failures)
        batch = Batch(
            images=torch.stack([item.image for item in items]),
            condition=torch.tensor([item.condition for item in items], dtype=torch.int64),
            positions=torch.tensor(self._positions, dtype=torch.int64),
            indices=torch.tensor(indices, dtype=torch.int64),
            bad=len(failures),
        )
        return _Loaded(batch, len(items) + len(failures), failures)

    def _index(self, step: int, position: int, attempt: int) -> int:
        """Dataset index for a place in the global batch; attempt 0 is the permutation's own."""
        size = len(self._dataset)
        if attempt > 0:
            return int(_draw(self._seed, _SUBSTITUTE, (step, position, attempt), 1)[0] % size)
        epoch, offset = divmod(step * self._batch_size + position, size)
        return int(_permutation(self._seed, epoch, size)[offset])


class _StepsFrom(Sampler[int]):
    def __init__(self, step: int) -> None:
        self._step = step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._step)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """int64 (size,). A sort of raw draws: numpy keeps those the same for ever, but not its own permutations."""
    return np.argsort(_draw(seed, _PERMUTATION, (epoch, 0, 0), size), kind="stable")


def _draw(seed: int, stream: int, counter: tuple[int, int, int], count: int) -> np.ndarray:
    """uint64 (count,) from the counter-based generator Philox."""
    words = np.array([0, *counter], dtype=np.uint64)  # the lowest word counts up within one call
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=words).random_raw(count)


def _leave_signals_to_parent(_worker: int) -> None:
    # Ctrl-C, or a scheduler that stops the job, signals every process of it. The parent must be able to save in peace,
    # and then stops its workers itself; if it dies, they notice.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _close(reference: "weakref.ref[Generator[Batch, None, None]]") -> None:
    if (stream := reference()) is not None:
        stream.close()
