"""Random numbers that belong to an image or an epoch, not to a process: keyed by seed, stream, and a place.

Neither the number of ranks, nor the micro-batch split, nor a resume, nor the device changes them. All come from one
counter-based generator (Philox 4x64) with key (seed, stream), so draws of two streams have nothing in common. Its raw
64-bit words are used directly because NumPy keeps those, unlike its distributions, the same from version to version.
"""

import math
from collections.abc import Sequence
from enum import IntEnum, unique
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@unique
class Stream(IntEnum):
    """What the draws of a seed are for. A number, once given, stays: a resumed run must go on with its own draws."""

    PERMUTATION = 0
    """Training: the order of an epoch's images."""
    SAMPLES = 1
    """Training: the tokens of a rollout."""
    CONDITION_DROP = 2
    """Training: which images lose their condition. The same for all methods, so that a control drops the same."""
    STREAM_BUFFER = 3
    """Streamed data: which of the waiting rows comes next."""
    CONTEXT_NOISE = 4
    """Training: which context tokens are replaced, and by what."""
    SUBSTITUTE = 5
    """Training: the image in place of one that cannot be used."""
    STREAM_FILES = 6
    """Streamed data: the order of an epoch's files."""
    REPORT_SAMPLES = 7
    """The teacher-forced samples that a report shows."""
    NEGATIVE_CLASS = 8
    """Training: the mismatched class of each image, for CCA."""
    SHIFT = 9
    """Training: by how many pixels an image is moved, for a classifier."""
    VALIDATION = 10
    """Training: what is drawn for a held-out image, its context noise and its sample."""
    PREVIEW = 11
    """Training: the teacher-forced samples of a preview."""
    GENERATION = 0x5A3B
    """Free-running sampling."""
    SCENES = 0x5CE7
    """The captioned shapes: all that is in a scene."""
    ALIGNMENT_ORDER = 0xA110
    """Alignment: which images are measured."""
    ALIGNMENT_NOISE = 0xA111
    """Alignment: context noise."""
    ALIGNMENT_SAMPLES = 0xA112
    """Alignment: teacher-forced samples."""


def words(seed: int, stream: Stream, place: tuple[int, int, int], count: int) -> np.ndarray:
    """uint64 (count,): the block of raw words at a place.

    seed, and every part of the place, in [0, 2**64); NumPy raises OverflowError otherwise. Words i of two blocks that
    differ in seed, stream or place are independent; a longer block begins like a shorter one.
    """
    # The lowest word of the counter is the one that advances within a block, so it starts at 0.
    counter = np.array([0, *place], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=np.array([seed, stream], dtype=np.uint64)).random_raw(count)


@lru_cache(maxsize=4)
def permutation(seed: int, stream: Stream, epoch: int, size: int) -> np.ndarray:
    """int64 (size,). A sort of raw words: NumPy keeps those the same for ever, but not its own permutations."""
    return np.argsort(words(seed, stream, (epoch, 0, 0), size), kind="stable")


def uniforms(
    seed: int,
    step: int,
    indices: Tensor | Sequence[int],
    shape: Sequence[int],
    *,
    stream: Stream,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One independent block of uniform numbers for each image.

    Args:
        seed: the run's seed, in [0, 2**64), as are step and every index (NumPy raises OverflowError otherwise).
        step: optimizer step.
        indices: (B,) position of each image in the global batch.
        shape: shape of one image's block.
        stream: which use the numbers are for.
        device: where the result goes; the numbers are the same on every device.

    Returns:
        float32 (B,*shape), multiples of 2**-24 in [0,1).
    """
    positions = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    blocks = np.empty((len(positions), math.prod(shape)), dtype=np.uint64)
    for block, index in zip(blocks, positions, strict=True):
        block[:] = words(seed, stream, (step, index, 0), block.size)
    values = (blocks >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(values).reshape(len(positions), *shape).to(device)
