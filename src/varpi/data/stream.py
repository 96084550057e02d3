"""Batches of data too large to hold: the Hub, parquet files or tar shards, read from beginning to end.

Each epoch takes the files in a new order and shuffles their rows in a buffer. Where the files can be dealt out evenly
(their number is a multiple of the number of processes, or so large that one more or less is nothing), each process
reads files of its own; otherwise each reads all of them and keeps every world_size-th row. Either way every row comes
once an epoch, to one process; the epochs of the processes are their own, and need not end together.

The sequence of a process is a function of data, seed and world_size alone, and a place in it, the cursor, is the number
of rows taken: to resume is to read again what was read before, without decoding it, at most one epoch and the part of
the current one.
"""

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from varpi.data.caption_check import CaptionCheck
from varpi.data.captions import CAPTION_FIELDS, pick_caption
from varpi.data.classes import Classes, number_classes, read_classes
from varpi.data.dataset import NO_CAPTION, NO_IMAGE, UNREADABLE, BadImage, Dropped, Item
from varpi.data.loader import Batch, Counts, close_at_exit, collate_conditions
from varpi.data.source import Place, caption_fields, locate
from varpi.data.transforms import load_image
from varpi.errors import VarpiError
from varpi.runtime.randomness import Stream, permutation, words

logger = logging.getLogger(__name__)

SHUFFLE_BUFFER = 1000
"""Rows that are shuffled among each other, where nothing else is asked for."""
# Rows without one that can be used, after which a run stops
_MAX_UNUSABLE = 1000
_DRAWS = 4096
# Files for each process from which on unequal numbers of them do not matter: its images come at most 1/32 more often
_MANY_FILES = 32

Row = tuple[str, dict[str, Any]]
"""What to call the row in an error, and its fields, with the image still encoded."""
Outcome = Item | BadImage | Dropped
Load = Callable[[str, dict[str, Any]], Item]
Opened = tuple[Sequence[Callable[[], Iterator[Row]]], Load, tuple[str, ...] | None, str]
"""The first four arguments of `StreamBatches`."""


class StreamBatches(Counts):
    """An endless, deterministic stream of batches of rows in files, to be continued from a cursor.

    A row that cannot be used makes room for the next one. `open` makes one from a source.

    Args:
        files: for each file, in an order that depends on the data alone, what begins to read its rows.
        load: makes an item of a row; raises BadImage or Dropped.
        class_names: of the items; None for captions.
        fingerprint: hex digest that changes with the data.
        shuffle_buffer: rows held in memory, encoded, among which the next one is picked; 1 keeps their order.
        batch_size: images in the global batch, over all ranks.
        seed: of the order.
        rank: this process's number in [0, world_size); positions are as in `Batches`.
        world_size: number of processes.
        workers: threads that decode ahead; 0 decodes when a batch is asked for. The content is the same.
        max_bad_fraction: as in `Batches`.

    Raises:
        VarpiError: no files, or arguments that contradict each other.
    """

    def __init__(
        self,
        files: Sequence[Callable[[], Iterator[Row]]],
        load: Load,
        *,
        class_names: tuple[str, ...] | None,
        fingerprint: str,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_bad_fraction: float = 0.01,
    ) -> None:
        if not files:
            raise VarpiError("the stream has no files; a batch needs at least one image")
        if batch_size < 1 or batch_size % world_size:
            raise VarpiError(f"batch_size is {batch_size}; it must be a positive multiple of {world_size} processes")
        if not 0 <= rank < world_size:
            raise VarpiError(f"rank is {rank}; it must be in [0, {world_size})")
        if workers < 0:
            raise VarpiError(f"workers is {workers}; it must be >= 0")
        if shuffle_buffer < 1:
            raise VarpiError(f"shuffle_buffer is {shuffle_buffer}; it must be at least 1")
        super().__init__(max_bad_fraction)
        self.class_names = class_names
        self.num_classes = None if class_names is None else len(class_names)
        self.fingerprint = fingerprint
        self._load = load
        self._check: CaptionCheck | None = None
        self._shuffle_buffer = shuffle_buffer
        self._local = batch_size // world_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._workers = workers
        own_files = len(files) % world_size == 0 or len(files) >= _MANY_FILES * world_size
        self._files = files[rank::world_size] if own_files else files
        self._rows_kept = slice(0, None) if own_files else slice(rank, None, world_size)
        if not own_files and rank == 0:
            logger.warning(
                "%d files cannot be dealt out to %d processes: each reads all of them and keeps one row in %d",
                len(files),
                world_size,
                world_size,
            )

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        image_size: int,
        split: str = "train",
        image_column: str = "image",
        label_column: str = "label",
        caption_column: str | Sequence[str] | None = None,
        min_side: int | None = None,
        classes: Classes | None = None,
        **options: Any,
    ) -> "StreamBatches":
        """Stream a dataset of the Hub, parquet files or tar shards, named as for `open_dataset`, as are the arguments.

        The members of a sample must follow one another in their tar shard. Classes must be named in the data
        (`ClassLabel`), because a stream does not know the largest of them.

        Args:
            options: as for the class itself, from `shuffle_buffer` on.

        Raises:
            VarpiError: as `open_dataset`, and for data that needs no stream.
        """
        files, load, class_names, fingerprint = _open(
            str(source),
            image_size=image_size,
            split=split,
            image_column=image_column,
            label_column=label_column,
            caption_column=caption_column,
            min_side=min_side,
            classes=classes,
        )
        return cls(files, load, class_names=class_names, fingerprint=fingerprint, **options)

    def check_captions(self, check: CaptionCheck | None) -> None:
        """Leave out from now on what `check` refuses."""
        self._check = check

    def cursor_at(self, step: int, saved: Sequence[int]) -> int:
        """Where this process goes on, given the cursors that all of them `saved`; none were at the beginning of a run.

        Raises:
            VarpiError: another number of processes saved them.
        """
        if not saved:
            return 0
        if len(saved) != self._world_size:
            raise VarpiError(
                f"a streamed run continues only with the same number of processes: it had {len(saved)}, this is "
                f"{self._world_size}; a run that is begun with data.lanes goes on with any that divides them"
            )
        return saved[self._rank]

    def from_cursor(self, cursor: int) -> Generator[Batch, None, None]:
        """Endless iterator over the batches from row `cursor` >= 0 of this process on; 0 is the first.

        A batch's `cursor` is what continues after it, and its `indices` number rows without two of a kind among the
        processes: rank + world_size * (place of the row in the sequence of its process).

        Raises:
            VarpiError: more than `max_bad_fraction` of the images were unreadable, 1000 rows in a row could not be
                used, or a file cannot be read.
        """
        stream = self._batches(cursor)
        close_at_exit(stream)
        return stream

    def _batches(self, cursor: int) -> Generator[Batch, None, None]:
        rows = self._rows_from(cursor)
        outcomes = itertools.starmap(self._outcome, rows) if self._workers == 0 else self._decoded_ahead(rows)
        positions = torch.arange(self._local) + self._rank * self._local
        while True:
            items: list[Item] = []
            indices: list[int] = []
            bad, dropped, unusable = 0, 0, 0
            while len(items) < self._local:
                number, outcome = next(outcomes)
                if isinstance(outcome, Item):
                    items.append(outcome)
                    indices.append(self._rank + self._world_size * number)
                    cursor, unusable = number + 1, 0
                    self.count(1, [])
                    continue
                broken = isinstance(outcome, BadImage)
                bad, dropped, unusable = bad + broken, dropped + (not broken), unusable + 1
                stuck = f"{_MAX_UNUSABLE} rows in a row cannot be trained on" if unusable == _MAX_UNUSABLE else None
                self.count(1, [(outcome.reason, str(outcome))], UNREADABLE if stuck and broken else stuck)
            yield Batch(
                images=torch.stack([item.image for item in items]),
                condition=collate_conditions([item.condition for item in items]),
                positions=positions,
                indices=torch.tensor(indices),
                bad=bad,
                dropped=dropped,
                cursor=cursor,
            )

    def _outcome(self, number: int, row: Row) -> tuple[int, Outcome]:
        try:
            item = self._load(*row)
            if self._check is not None and isinstance(item.condition, str):
                self._check(item.condition, row[0])
            return number, item
        except (BadImage, Dropped) as error:
            return number, error

    def _decoded_ahead(self, rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Outcome]]:
        """One thread reads, the others decode, two batches ahead; in order."""
        reader, decoders = ThreadPoolExecutor(1), ThreadPoolExecutor(self._workers)
        ahead: deque[Future[tuple[int, Outcome]]] = deque()
        try:
            while True:
                while len(ahead) < 2 * self._local + self._workers:
                    read = reader.submit(next, rows)
                    ahead.append(decoders.submit(lambda read: self._outcome(*read.result()), read))
                yield ahead.popleft().result()
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
            decoders.shutdown(wait=False, cancel_futures=True)

    def _rows_from(self, cursor: int) -> Iterator[tuple[int, Row]]:
        """The rows of this process over all epochs, numbered, from number `cursor` on."""
        epoch = number = 0
        while True:
            first = number
            for row in self._epoch(epoch):
                if number >= cursor:
                    yield number, row
                number += 1
            if number == first:
                raise VarpiError(f"the stream has too few rows for {self._world_size} processes; one finds none")
            epoch += 1
            if cursor > number:  # every epoch is as long as the first
                epoch = cursor // number
                number *= epoch

    def _epoch(self, epoch: int) -> Iterator[Row]:
        order = permutation(self._seed, Stream.STREAM_FILES, epoch, len(self._files))
        rows = itertools.chain.from_iterable(self._files[number]() for number in order)
        kept = itertools.islice(rows, self._rows_kept.start, None, self._rows_kept.step)
        return _shuffled(kept, self._shuffle_buffer, self._draws(epoch))

    def _draws(self, epoch: int) -> Iterator[int]:
        for block in itertools.count():
            yield from words(self._seed, Stream.STREAM_BUFFER, (epoch, block, 0), _DRAWS).tolist()


class FirstRows:
    """The first rows of a stream, held encoded, with random access: what is looked at while the rest streams.

    Args:
        source: as for `StreamBatches.open`.
        count: of rows; fewer where the stream has no more.
        asked: its arguments from `image_size` to `classes`.

    Raises:
        VarpiError: as `StreamBatches.open`, or it has no rows.
    """

    def __init__(self, source: str | Path, count: int, **asked: Any) -> None:
        files, self._load, self.class_names, whole = _open(str(source), **asked)
        self.num_classes = None if self.class_names is None else len(self.class_names)
        self.fingerprint = hashlib.sha256(f"{whole} first {count}".encode()).hexdigest()
        self._rows = list(itertools.islice(itertools.chain.from_iterable(file() for file in files), count))
        if not self._rows:
            raise VarpiError(f"{source}: split {asked.get('split', 'train')!r} has no rows")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        return self._load(*self._rows[index])

    def name(self, index: int) -> str:
        return self._rows[index][0]


def _shuffled(rows: Iterator[Row], size: int, draws: Iterator[int]) -> Iterator[Row]:
    """Each row in turn takes the place of a random one of the `size` that wait, which comes out."""
    waiting = list(itertools.islice(rows, size))
    for row in rows:
        place = next(draws) % size
        row, waiting[place] = waiting[place], row
        yield row
    while waiting:
        place = next(draws) % len(waiting)
        waiting[place], waiting[-1] = waiting[-1], waiting[place]
        yield waiting.pop()


def _open(
    source: str,
    *,
    image_size: int,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    caption_column: str | Sequence[str] | None = None,
    min_side: int | None = None,
    classes: Classes | None = None,
) -> Opened:
    if image_size < 1:
        raise VarpiError(f"image_size is {image_size}; it must be at least 1")
    fields = caption_fields(caption_column)
    if fields and label_column != "label":
        raise VarpiError(f"label_column {label_column!r} and caption_column are both given; leave out one of them")
    known = None if classes is None else read_classes(classes)
    place = locate(source, split)
    if place.kind == "tar":
        opened = _open_tars(place, fields or CAPTION_FIELDS, image_size, min_side)
    elif place.kind in ("parquet", "hub"):
        name = f"{source}[{split}]"
        opened = _open_table(place, split, name, image_column, label_column, fields, image_size, min_side, known)
    else:
        raise VarpiError(f"{source}: only parquet files, tar shards and the Hub are streamed; leave out stream")
    if known is not None and opened[2] is None:
        raise VarpiError(f"{source}: has captions, but {len(known)} classes are named for it; leave them out")
    return opened


def _open_tars(place: Place, fields: Sequence[str], image_size: int, min_side: int | None) -> Opened:
    from varpi.data.tars import check_shard, read_samples, sample_caption

    smallest = image_size if min_side is None else min_side

    def load(name: str, parts: dict[str, bytes]) -> Item:
        if "image" not in parts:
            raise Dropped(f"{name}: no image", NO_IMAGE)
        caption = sample_caption(parts.get("json"), parts.get("txt"), fields, name)
        return Item(load_image(parts["image"], name, image_size, min_side=smallest), caption)

    for path in place.paths:
        check_shard(str(path))
    return [partial(read_samples, str(path)) for path in place.paths], load, None, _fingerprint(place.paths)


def _open_table(
    place: Place,
    split: str,
    name: str,
    image_column: str,
    label_column: str,
    fields: Sequence[str],
    image_size: int,
    min_side: int | None,
    classes: tuple[str, ...] | None,
) -> Opened:
    from varpi.data.tables import (
        Columns,
        check_columns,
        check_image_type,
        common_folder,
        decode_cell,
        stream_hub,
        stream_parquet,
    )

    folder = repository = None
    if place.kind == "hub":
        rows, commit = stream_hub(place.name, place.revision, split)
        fingerprint = _fingerprint((), place.name, commit, split)
        repository = f"hf://datasets/{place.name}@{commit}"
    else:
        rows, paths = stream_parquet(
            place.paths, split, Columns(image_column, None if fields else label_column, fields)
        )
        fingerprint = _fingerprint(paths, split)
        folder = place.paths[0] if place.paths[0].is_dir() else common_folder(paths)
    features: Any = rows.features
    columns = check_columns(
        list(features),
        name,
        image_column=image_column,
        label_column=None if fields else label_column,
        caption_columns=fields,
    )
    check_image_type(features.arrow_schema.field(image_column).type, name, image_column)
    rows = rows.select_columns([image_column, *columns])
    files = [partial(_read_rows, rows, number, name) for number in range(rows.num_shards)]
    cell = partial(decode_cell, image_size=image_size, folder=folder, repository=repository)
    smallest = image_size if min_side is None else min_side

    def load_captioned(name: str, row: dict[str, Any]) -> Item:
        caption = pick_caption(row, fields)
        if caption is None:
            raise Dropped(f"{name}: no caption in {' or '.join(fields)}", NO_CAPTION)
        return Item(cell(row[image_column], name, min_side=smallest), caption)

    if fields:
        return files, load_captioned, None, fingerprint
    if min_side is not None:
        raise VarpiError(f"{name}: min_side is for captioned images of many sizes; leave it out")
    stored = getattr(features[label_column], "names", None)
    if stored is None and classes is None:
        raise VarpiError(
            f"{name}: column {label_column!r} does not name its classes (ClassLabel), and a stream cannot count them; "
            "leave out stream, or give data.classes or caption_column"
        )
    ids, class_names = (range(len(classes or ())), classes) if stored is None else number_classes(stored, classes, name)

    def load_labelled(name: str, row: dict[str, Any]) -> Item:
        label = row[label_column]
        if type(label) is not int or not 0 <= label < len(ids):
            raise VarpiError(f"{name}: column {label_column!r} holds {label!r:.80}, but names {len(ids)} classes")
        return Item(cell(row[image_column], name), ids[label])

    return files, load_labelled, class_names, fingerprint


def _read_rows(rows: Any, file: int, name: str) -> Iterator[Row]:
    """The rows of one of the files of a streamed dataset."""
    from varpi.data.tables import reason

    try:
        for number, row in enumerate(rows.shard(num_shards=rows.num_shards, index=file)):
            yield f"{name} file {file} row {number}", row
    except Exception as error:
        raise VarpiError(f"{name}: file {file} cannot be read on ({reason(error)})") from error


def _fingerprint(paths: Sequence[Path], *facts: str) -> str:
    files = [f"{path.name} {path.stat().st_size}" for path in paths]
    return hashlib.sha256("\0".join([*facts, *files]).encode()).hexdigest()
