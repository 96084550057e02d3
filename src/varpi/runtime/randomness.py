"""Uniform draws that belong to an image, not to a process: keyed by seed, stream, step and global image position.

Neither the number of ranks, nor the micro-batch split, nor a resume, nor the device changes them.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(
    seed: int,
    step: int,
    indices: Tensor | Sequence[int],
    shape: Sequence[int],
    *,
    stream: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One independent block of uniform numbers for each image.

    A counter-based generator (Philox 4x64) with key (seed, stream) and counter (step, index); the raw 64-bit words are
    used directly because NumPy keeps those, unlike its distributions, the same from version to version.

    Args:
        seed: the run's seed, in [0, 2**64), as are step, stream and every index (NumPy raises OverflowError otherwise).
        step: optimizer step.
        indices: (B,) position of each image in the global batch.
        shape: shape of one image's block.
        stream: which use the numbers are for; different streams are independent.
        device: where the result goes; the numbers are the same on every device.

    Returns:
        float32 (B,*shape), multiples of 2**-24 in [0,1).
    """
    positions = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    words = np.empty((len(positions), math.prod(shape)), dtype=np.uint64)
    key = np.array([seed, stream], dtype=np.uint64)
    for row, index in zip(words, positions, strict=True):
        # The lowest word of the counter is the one that advances within a block, so it starts at 0.
        counter = np.array([0, step, index, 0], dtype=np.uint64)
        row[:] = np.random.Philox(counter=counter, key=key).random_raw(row.size)
    values = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(values).reshape(len(positions), *shape).to(device)
