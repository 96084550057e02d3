"""Draws belong to (seed, stream, step, image) and to nothing else."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from varpi.runtime.randomness import Stream, permutation, uniforms, words

SAMPLES = Stream.SAMPLES


def test_block_is_the_same_however_the_batch_is_split():
    whole = uniforms(3, 7, [0, 1, 2, 3, 4], (4, 6), stream=SAMPLES)
    halves = [uniforms(3, 7, part, (4, 6), stream=SAMPLES) for part in (torch.tensor([0, 1]), [2, 3, 4])]
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(uniforms(3, 7, [4, 1], (4, 6), stream=SAMPLES), whole[[4, 1]])


def test_a_longer_block_begins_like_a_shorter_one():
    whole, part = (uniforms(0, 0, [5], (size,), stream=SAMPLES) for size in (10, 3))
    assert torch.equal(whole[:, :3], part)


@pytest.mark.parametrize("other", [{"seed": 4}, {"step": 8}, {"stream": Stream.CONDITION_DROP}, {"indices": [1]}])
def test_every_part_of_the_key_changes_the_block(other: dict):
    key = {"seed": 3, "step": 7, "indices": [0], "stream": SAMPLES}
    first, second = (uniforms(**(key | extra), shape=(2000,)) for extra in ({}, other))
    assert (first == second).float().mean() < 0.01
    assert abs(torch.corrcoef(torch.cat([first, second]))[0, 1]) < 0.1


def test_no_two_streams_share_a_word():
    """Epoch 3's order once was drawn from the very words of step 3's context noise."""
    places = [(3, 0, 0), (3, 1, 0), (0, 0, 0)]
    blocks = {(stream, place): words(0, stream, place, 64) for stream, place in itertools.product(Stream, places)}
    assert len(np.unique(np.concatenate(list(blocks.values())))) == 64 * len(Stream) * len(places)
    order = words(0, Stream.PERMUTATION, (3, 0, 0), 64)
    noise = uniforms(0, 3, [0], (64,), stream=Stream.CONTEXT_NOISE)[0]
    assert permutation(0, Stream.PERMUTATION, 3, 64).tolist() == np.argsort(order).tolist()
    assert np.argsort(noise.numpy()).tolist() != np.argsort(order).tolist()


def test_the_table_of_streams():
    """No number may change: a run, resumed under another version of varpi, must go on with its own draws."""
    assert {stream.name: stream.value for stream in Stream} == {
        "PERMUTATION": 0,
        "SAMPLES": 1,
        "CONDITION_DROP": 2,
        "STREAM_BUFFER": 3,
        "CONTEXT_NOISE": 4,
        "SUBSTITUTE": 5,
        "STREAM_FILES": 6,
        "REPORT_SAMPLES": 7,
        "NEGATIVE_CLASS": 8,
        "SHIFT": 9,
        "VALIDATION": 10,
        "PREVIEW": 11,
        "GENERATION": 0x5A3B,
        "SCENES": 0x5CE7,
        "ALIGNMENT_ORDER": 0xA110,
        "ALIGNMENT_NOISE": 0xA111,
        "ALIGNMENT_SAMPLES": 0xA112,
    }
    assert len({stream.value for stream in Stream}) == len(Stream.__members__)  # an alias would be a shared stream


def test_values_are_uniform_on_the_half_open_unit_interval():
    values = uniforms(1, 2, range(100), (1000,), stream=SAMPLES)
    assert values.dtype == torch.float32
    assert values.shape == (100, 1000)
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 0.01


def test_first_numbers_are_pinned():
    """A resumed run on another version of NumPy must continue with the same draws."""
    values = uniforms(1, 2, [3], (3,), stream=Stream.CONTEXT_NOISE).flatten() * 2**24
    assert values.tolist() == [16089830.0, 6513625.0, 4131596.0]
    assert permutation(5, Stream.PERMUTATION, 2, 8).tolist() == [7, 0, 6, 1, 4, 5, 2, 3]


def test_no_images_give_an_empty_tensor():
    assert uniforms(1, 2, [], (3, 2), stream=SAMPLES).shape == (0, 3, 2)


def test_negative_seed_is_refused():
    with pytest.raises(OverflowError):
        uniforms(-1, 0, [0], (1,), stream=SAMPLES)
