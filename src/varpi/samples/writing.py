"""Sample sets: images generated part by part into a directory, by one process or several, with the record of how.

A part is a batch: the images [k b, (k + 1) b) for a batch size b. The random numbers of an image depend on its place
alone, but rounding depends on the company in a batch, and the parts are the same whoever makes them. So the files are
the same bytes for any number of processes and after any interruption (on one kind of device, with as many threads;
torchrun gives each process one).
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from varpi.data import BadImage
from varpi.data.images import decode
from varpi.data.pixels import to_uint8
from varpi.errors import VarpiError
from varpi.runtime.memory import check_memory
from varpi.runtime.parts import claim, difference, wait
from varpi.runtime.processes import World
from varpi.samples.images import NpzWriter, resize_384_to_256, save_grid, save_png
from varpi.samples.reading import RECORD, UNFINISHED
from varpi.sampling.generate import generate_with
from varpi.sampling.settings import Sampling

IN_GRID = 100


def write_samples(
    output: Path,
    generator: Any,
    tokenizer: Any,
    condition: Any,
    *,
    sampling: Sampling,
    record: Mapping[str, Any],
    resize: int | None = None,
    batch_size: int = 64,
    graph: bool = False,
    world: World | None = None,
    together: bool = False,
    progress: bool = False,
) -> bool:
    """Fill `output` with 00000.png …, grid.png, samples.npz (ADM's layout) and, last, sample.json.

    Of several processes with this same call each makes its share of the parts; the main one waits for all and finishes.
    Started again, it goes on with what is missing; only a batch of images is in memory at a time.

    condition: class ids or prompts, one an image. sampling: its seed is 0 unless given.
    record: what else sample.json says.
    batch_size: images at once; at most as many as there are.
    graph: as for `generate_with`.
    world: the processes that share the work; they need to see the same `output`. None: this one alone.
    together: also the others return only when all is there.

    Returns whether there was anything to do: False when sample.json says that these very samples are there.

    Raises VarpiError for a resize other than from 384 to 256, a batch that cannot fit into memory, and a directory that
    holds something else, such as samples of other settings.
    """
    world = world or World(0, 1, "cpu")
    sampling = replace(sampling, seed=sampling.seed or 0)
    device = next(iter(generator.parameters())).device
    side = image_side(generator, tokenizer, resize)
    count = len(condition)
    if batch_size < 1:
        raise VarpiError(f"batch_size is {batch_size}; it must be at least 1")
    batch_size = min(batch_size, count)
    pixels = (generator.grid * tokenizer.downsample) ** 2
    least = 4 * (generator.vocab_size + 3 * pixels)  # a position's logits and the decoded image
    check_memory(batch_size * least, f"batch_size {batch_size}: their logits and pixels", str(device))
    # Refused before anything is written; of captions the first stands for all, for they may go through an encoder
    generator.prepare_condition(condition if isinstance(condition, torch.Tensor) else condition[:1])
    request = {
        **record,
        "resize": resize,
        **asdict(sampling),
        "batch_size": batch_size,
        "device": device.type,
        "count": count,
        **asked_for(condition),
    }
    if (output / RECORD).is_file():
        if other := difference(output / RECORD, request):
            raise VarpiError(f"{output / RECORD}: {other}; these are other samples: choose another directory")
        return False
    files = [output / image_name(i, count) for i in range(count)]
    unfinished = output / UNFINISHED
    in_use = output.exists() and (not output.is_dir() or any(output.glob("[!.]*")))  # but for a lock
    if world.is_main and in_use and not unfinished.is_file():
        raise VarpiError(f"{output} already holds something; choose another directory")
    claim(
        unfinished,
        request,
        world,
        remedy="to go on, give the settings of the samples that were begun there; or choose another directory",
        untouched=not any(output.glob("[0-9]*.png")),
        done=(output / RECORD).is_file,
    )
    parts = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
    mine = parts[world.rank :: world.size]
    bar = Progress(console=Console(stderr=True), disable=not progress or len(parts) == 1)
    with bar, ThreadPoolExecutor() as pool:
        task = bar.add_task("images", total=sum(map(len, mine)))
        for part in mine:
            if _read(files[part.start : part.stop], side) is None:
                tokens = generate_with(
                    generator,
                    condition[part.start : part.stop],
                    sampling,
                    first=part.start,
                    batch_size=batch_size,
                    graph=graph,
                    progress=progress and len(parts) == 1,
                )
                with torch.inference_mode():
                    decoded = tokenizer.decode(tokens)
                images = to_uint8(decoded if resize is None else resize_384_to_256(decoded))
                list(pool.map(partial(save_png, sync=False), files[part.start : part.stop], images))
            bar.advance(task, len(part))
    if world.is_main:
        _assemble(output, files, parts, side, progress=progress)
    elif together:
        for part in parts:  # one after the other, so that the patience is for one part
            own = files[part.start : part.stop]
            wait(lambda own=own: all(file.is_file() for file in own) or None, f"{own[0]} to {own[-1].name}")
        wait(lambda: (output / RECORD).is_file() or None, f"{output / RECORD}")
    return True


def asked_for(condition: Any) -> dict[str, Any]:
    """What each image is to show, as sample.json says it: the class or the prompt of each."""
    return {"classes": condition.tolist()} if isinstance(condition, torch.Tensor) else {"prompts": list(condition)}


def image_side(generator: Any, tokenizer: Any, resize: int | None) -> int:
    """The pixels per side of a pair's samples. Raises VarpiError for a resize other than from 384 to 256."""
    side = generator.grid * tokenizer.downsample
    if resize is not None and (side, resize) != (384, 256):
        raise VarpiError(f"--resize {resize}: only 384 to 256 is defined; these images are {side} pixels")
    return resize or side


def image_name(number: int, count: int) -> str:
    """The file of one of `count` images; the names' order is that of the numbers."""
    return f"{number:0{max(5, len(str(count - 1)))}d}.png"


def check_space(output: Path, count: int, side: int) -> None:
    """Refuse to make `count` images of `side` x `side` pixels where the disk cannot hold what of them is not there yet.

    The archive takes three bytes a pixel, the PNGs about half of that.
    """
    place = output.absolute()
    while not place.exists():
        place = place.parent
    made = sum(1 for _ in output.glob("[0-9]*.png")) if output.is_dir() else 0
    needed, free = side * side * 3 * (count + max(count - made, 0) / 2), shutil.disk_usage(place).free
    if needed > free:
        raise VarpiError(
            f"{output}: no space left on the disk for {count:,} images of {side}x{side} pixels: they take about "
            f"{needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free; make fewer, or choose another disk"
        )


def _assemble(output: Path, files: Sequence[Path], parts: Sequence[range], side: int, *, progress: bool) -> None:
    """Wait for each part, and make of them the archive, the grid and, last, the record."""
    shown = []
    with (
        NpzWriter(output / "samples.npz", (len(files), side, side, 3)) as archive,
        Progress(console=Console(stderr=True), disable=not progress or len(parts) == 1) as bar,
    ):
        for part in bar.track(parts, description="assembling"):
            own = files[part.start : part.stop]
            images = wait(lambda own=own: _read(own, side), f"{own[0]} to {own[-1].name}")
            archive.write(images)
            if part.start < IN_GRID:
                shown.append(images[: IN_GRID - part.start])
    save_grid(output / "grid.png", np.concatenate(shown))
    for stray in output.glob(".*.part"):  # of processes that were killed
        stray.unlink(missing_ok=True)
    os.sync()  # once for all; the record then vouches for them
    os.replace(output / UNFINISHED, output / RECORD)


def _read(files: Sequence[Path], side: int) -> np.ndarray | None:
    """The images of a part, uint8 (b,S,S,3); None unless all are there and whole."""
    if not all(file.is_file() for file in files):
        return None
    images = np.empty((len(files), side, side, 3), dtype=np.uint8)
    for row, file in zip(images, files, strict=True):
        try:
            pixels = np.asarray(decode(file, str(file)))
        except BadImage:
            return None
        if pixels.shape != row.shape:
            return None
        row[:] = pixels
    return images
