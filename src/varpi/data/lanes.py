"""A stream read as a fixed number of sequences, so that how many processes share them changes nothing.

What a lane reads, and the part of each batch that it fills, is a function of data, seed and the number of lanes. A
process has as many neighbouring lanes as the others; its cursor is those of its lanes.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch

from varpi.data.caption_check import CaptionCheck
from varpi.data.left_out import LeftOut
from varpi.data.loader import Batch
from varpi.data.stream import StreamBatches
from varpi.errors import VarpiError


class Lanes:
    """This process's lanes, as one stream of batches.

    open_lane: the stream of one lane, of this number among so many. Each counts for itself what it leaves out, and
        stops the run by its own share.
    lanes: how many there are, over all processes.
    """

    def __init__(
        self, open_lane: Callable[[int, int], StreamBatches], lanes: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if lanes % world_size:
            raise VarpiError(f"data.lanes is {lanes}; it must be a multiple of {world_size} processes")
        own = lanes // world_size
        self._lanes = lanes
        self._numbers = range(rank * own, (rank + 1) * own)
        self._streams = [open_lane(number, lanes) for number in self._numbers]
        self.class_names = self._streams[0].class_names
        self.num_classes = self._streams[0].num_classes
        self.fingerprint = self._streams[0].fingerprint

    @property
    def seen(self) -> int:
        """Items looked at so far, unusable ones included."""
        return sum(stream.seen for stream in self._streams)

    @seen.setter
    def seen(self, count: int) -> None:
        for stream in self._streams:
            stream.seen = 0
        self._streams[0].seen = count

    @property
    def left_out(self) -> LeftOut:
        """Those that could not be used, or were left out on purpose."""
        return LeftOut(*(stream.left_out.found for stream in self._streams))

    @left_out.setter
    def left_out(self, counted: LeftOut) -> None:
        for stream in self._streams:
            stream.left_out = LeftOut()
        self._streams[0].left_out = counted

    def check_captions(self, check: CaptionCheck | None) -> None:
        """Leave out from now on what `check` refuses."""
        for stream in self._streams:
            stream.check_captions(check)

    def cursor_at(self, step: int, saved: Sequence[int]) -> tuple[int, ...]:
        """Where this process goes on, given the cursors of all lanes; none were saved at the beginning of a run.

        Raises VarpiError for the cursors of another number of lanes.
        """
        if saved and len(saved) != self._lanes:
            raise VarpiError(f"the run was saved with {len(saved)} cursors of its stream; data.lanes is {self._lanes}")
        return tuple(saved[number] if saved else 0 for number in self._numbers)

    def from_cursor(self, cursor: tuple[int, ...] | int) -> Generator[Batch, None, None]:
        """Endless iterator over the batches from there on, the part of each lane after that of the one before."""
        cursors = (0,) * len(self._streams) if cursor == 0 else cursor
        assert isinstance(cursors, tuple)
        with ExitStack() as stack:
            parts = [
                stack.enter_context(closing(stream.from_cursor(place)))
                for stream, place in zip(self._streams, cursors, strict=True)
            ]
            while True:
                yield _joined([next(part) for part in parts])


def _joined(batches: Sequence[Batch]) -> Batch:
    conditions = [batch.condition for batch in batches]
    tensors = [condition for condition in conditions if isinstance(condition, torch.Tensor)]
    listed: Any = [entry for condition in conditions if isinstance(condition, list) for entry in condition]
    return Batch(
        images=torch.cat([batch.images for batch in batches]),
        condition=torch.cat(tensors) if tensors else listed,
        positions=torch.cat([batch.positions for batch in batches]),
        indices=torch.cat([batch.indices for batch in batches]),
        bad=sum(batch.bad for batch in batches),
        dropped=sum(batch.dropped for batch in batches),
        cursor=tuple(batch.cursor for batch in batches if isinstance(batch.cursor, int)),
    )
