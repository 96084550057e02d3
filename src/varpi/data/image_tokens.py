"""The tokens of a data source's images in one file, encoded once, in parts that processes share.

Shapes: n images of N tokens.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from varpi.data.dataset import BadImage, Dataset, Dropped
from varpi.data.left_out import LeftOut
from varpi.errors import VarpiError
from varpi.runtime.files import clear_parts, write_aside
from varpi.runtime.memory import check_memory
from varpi.runtime.parts import claim, difference, wait
from varpi.runtime.processes import World

TOKENS_KEY = "varpi"
"""Of the metadata of a file of tokens: JSON of what they are, and of what was left out."""
PART = 1024
"""Rows of the data in one part, about: as many whole batches as they hold."""


def encode_images(
    dataset: Dataset,
    tokenizer: Any,
    output: Path,
    *,
    about: Mapping[str, Any],
    image_size: int,
    batch_size: int = 16,
    world: World | None = None,
    progress: bool = False,
) -> tuple[int, bool]:
    """Write safetensors with tokens int32 (n,N), indices int64 (n,) and, where the data has them, classes int64 (n,).

    A batch is always the rows [k b, (k + 1) b) for a batch size b, and a part some of these, whoever encodes it; so the
    file is the same for any number of processes and after any interruption. Parts lie in OUTPUT.unfinished until the
    main process, which waits for all, has put them together.

    tokenizer: on the device where it is to encode.
    about: where images ("data", which names them in messages) and tokenizer come from. With all else that decides the
        tokens it goes into the file's metadata, as JSON under `TOKENS_KEY`; so does what was left out, which the main
        process says.
    world: the processes that share the work, each with this same call. None: this one alone.

    Returns n (on other processes than the main one: of the whole file, or 0 before it is there), and whether there was
    anything to do: not when these very tokens are there.

    Raises VarpiError when `output` is there and holds anything else, when tokens of other settings were begun, for a
    batch beyond the memory, and for a source without a readable image.
    """
    world = world or World(0, 1, "cpu")
    device = next(tokenizer.parameters()).device
    if batch_size < 1:
        raise VarpiError(f"batch_size is {batch_size}; it must be at least 1")
    batch_size = min(batch_size, max(1, len(dataset)))
    images = f"batch_size {batch_size}: images of {image_size} pixels"
    check_memory(batch_size * 4 * 3 * image_size**2, images, str(device))
    with torch.inference_mode():  # a size that the tokenizer refuses is refused before anything is written
        tokenizer.encode(torch.zeros(1, 3, image_size, image_size, device=device))
    asked = {
        **about,
        "fingerprint": dataset.fingerprint,
        "image_size": image_size,
        "batch_size": batch_size,
        "device": device.type,
        "class_names": dataset.class_names,
    }
    folder = output.with_name(f"{output.name}.unfinished")
    if os.path.lexists(output):
        left_out = _check_finished(output, asked)
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            left_out.say(about["data"], len(dataset), "images")
        return _count(output), False
    claim(
        folder / "request.json",
        asked,
        world,
        remedy=f"to go on, give the settings of the tokens that were begun there, or remove {folder}",
        untouched=not any(folder.glob("*.safetensors")),
        done=output.exists,
    )
    rows = batch_size * max(1, PART // batch_size)
    parts = [range(start, min(start + rows, len(dataset))) for start in range(0, len(dataset), rows)]
    files = [folder / f"{number:06d}.safetensors" for number in range(len(parts))]
    mine = list(zip(parts, files, strict=True))[world.rank :: world.size]
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("encoding images", total=sum(len(part) for part, _ in mine))
        for part, file in mine:
            if not file.is_file():
                left_out = LeftOut()
                advance = partial(bar.advance, task)
                tensors = _encode(dataset, part, tokenizer, batch_size, device, left_out, advance)
                about_part = {TOKENS_KEY: json.dumps({"left_out": left_out.found})}
                write_aside(file, partial(save_file, tensors, metadata=about_part))
    if not world.is_main:
        return 0, True
    for file in files:
        wait(lambda file=file: file.is_file() or None, f"{file}")
    left_out = LeftOut(*(_record(file)["left_out"] for file in files))
    clear_parts([output])
    record = json.dumps({**asked, "left_out": left_out.found})
    count = _assemble(files, output, {TOKENS_KEY: record})  # one entry: safetensors would shuffle several
    shutil.rmtree(folder, ignore_errors=True)
    if not count:
        raise VarpiError(f"{about['data']}: none of its {len(dataset)} images can be used: {left_out}")
    left_out.say(about["data"], len(dataset), "images")
    return count, True


def _encode(
    dataset: Dataset,
    part: range,
    tokenizer: Any,
    batch_size: int,
    device: torch.device,
    left_out: LeftOut,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    """The tensors of one part."""
    tokens: list[Tensor] = []
    indices: list[int] = []
    classes: list[Any] = []
    for start in range(part.start, part.stop, batch_size):
        batch = range(start, min(start + batch_size, part.stop))
        images = []
        for index in batch:
            try:
                item = dataset[index]
            except (BadImage, Dropped) as error:
                left_out.note(error)
                continue
            images.append(item.image)
            indices.append(index)
            classes.append(item.condition)
        if images:
            with torch.inference_mode():
                tokens.append(tokenizer.encode(torch.stack(images).to(device)).int().cpu())
        advance(len(batch))
    tensors = {
        "tokens": torch.cat(tokens) if tokens else torch.zeros(0, 0, dtype=torch.int32),
        "indices": torch.tensor(indices, dtype=torch.int64),
    }
    if dataset.num_classes is not None:
        tensors["classes"] = torch.tensor(classes, dtype=torch.int64)
    return tensors


def _assemble(files: Sequence[Path], output: Path, metadata: dict[str, str]) -> int:
    """Put the parts together; the number of images. Nothing is written for none."""
    counts = [_count(file) for file in files]
    whole: dict[str, Tensor] = {}
    end = 0
    for file, count in zip(files, counts, strict=True):
        if not count:
            continue
        for name, part in load_file(file).items():
            if name not in whole:  # at once, so that the tokens are in memory once
                whole[name] = torch.empty(sum(counts), *part.shape[1:], dtype=part.dtype)
            whole[name][end : end + count] = part
        end += count
    if whole:
        size = sum(tensor.nbytes for tensor in whole.values())
        write_aside(output, lambda aside: save_file(whole, aside, metadata=metadata), size=size)
    return end


def _count(file: Path) -> int:
    with safe_open(file, framework="pt") as opened:
        return opened.get_slice("indices").get_shape()[0]


def _record(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        return dict(json.loads((opened.metadata() or {})[TOKENS_KEY]))


def _check_finished(output: Path, asked: Mapping[str, Any]) -> LeftOut:
    """What was left out of a file that is there; anything but the tokens that are asked for is refused."""
    try:
        _count(output)
        record = _record(output)
        left_out, other = LeftOut(record["left_out"]), difference(record, asked)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise VarpiError(f"--output {output}: already exists; choose another") from error
    if other:
        raise VarpiError(f"--output {output}: already exists and holds other tokens ({other}); choose another")
    return left_out
