"""Sample sets: images generated part by part into a directory, with the record of how."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varpi.data.pixels import to_uint8
from varpi.errors import VarpiError
from varpi.runtime.files import write_text
from varpi.samples.images import NpzWriter, resize_384_to_256, save_grid, save_png
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
    progress: bool = False,
) -> int:
    """Fill `output` with 00000.png …, grid.png, samples.npz (ADM's layout) and, last, sample.json; how many images.

    condition: class ids or prompts, one an image. record: what else sample.json says. Only a
    batch of images is in memory at a time. Raises VarpiError for a resize other than from 384 to 256.
    """
    side = generator.grid * tokenizer.downsample
    if resize is not None and (side, resize) != (384, 256):
        raise VarpiError(f"--resize {resize}: only 384 to 256 is defined; these images are {side} pixels")
    if batch_size < 1:
        raise VarpiError(f"batch_size is {batch_size}; it must be at least 1")
    generator.prepare_condition(condition[:1])  # refused before anything is written
    output.mkdir(parents=True, exist_ok=True)
    count, shown = len(condition), []
    with NpzWriter(output / "samples.npz", (count, resize or side, resize or side, 3)) as archive:
        for first in range(0, count, batch_size):
            part = condition[first : first + batch_size]
            tokens = generate_with(generator, part, sampling, first=first, batch_size=batch_size, progress=progress)
            with torch.inference_mode():
                decoded = tokenizer.decode(tokens)
            images = to_uint8(decoded if resize is None else resize_384_to_256(decoded))
            for i, image in enumerate(images):
                save_png(output / f"{first + i:05d}.png", image)
            archive.write(images)
            if first < IN_GRID:
                shown.append(images[: IN_GRID - first])
    save_grid(output / "grid.png", np.concatenate(shown))
    asked = {"classes": condition.tolist()} if isinstance(condition, torch.Tensor) else {"prompts": list(condition)}
    how = {**record, "resize": resize, **asdict(sampling)}
    write_text(output / "sample.json", json.dumps({**how, "count": count, **asked}))
    return count
