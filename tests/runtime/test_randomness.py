"""Draws belong to (seed, stream, step, image) and to nothing else."""

import pytest
import torch
from scipy import stats

from varpi.runtime.randomness import uniforms


def test_block_is_the_same_however_the_batch_is_split():
    whole = uniforms(3, 7, [0, 1, 2, 3, 4], (4, 6), stream=1)
    halves = [uniforms(3, 7, torch.tensor([0, 1]), (4, 6), stream=1), uniforms(3, 7, [2, 3, 4], (4, 6), stream=1)]
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(uniforms(3, 7, [4, 1], (4, 6), stream=1), whole[[4, 1]])


def test_a_longer_block_begins_like_a_shorter_one():
    assert torch.equal(uniforms(0, 0, [5], (10,), stream=0)[:, :3], uniforms(0, 0, [5], (3,), stream=0))


@pytest.mark.parametrize("other", [{"seed": 4}, {"step": 8}, {"stream": 2}, {"indices": [1]}])
def test_every_part_of_the_key_changes_the_block(other: dict):
    key = {"seed": 3, "step": 7, "indices": [0], "stream": 1}
    first, second = (uniforms(**(key | extra), shape=(2000,)) for extra in ({}, other))
    assert (first == second).float().mean() < 0.01
    assert abs(torch.corrcoef(torch.cat([first, second]))[0, 1]) < 0.1


def test_values_are_uniform_on_the_half_open_unit_interval():
    values = uniforms(1, 2, range(100), (1000,), stream=0)
    assert values.dtype == torch.float32
    assert values.shape == (100, 1000)
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values.flatten().numpy(), "uniform").pvalue > 0.01


def test_first_numbers_are_pinned():
    """A resumed run on another version of NumPy must continue with the same draws."""
    values = uniforms(1, 2, [3], (3,), stream=4).flatten() * 2**24
    assert values.tolist() == [16089830.0, 6513625.0, 4131596.0]


def test_no_images_give_an_empty_tensor():
    assert uniforms(1, 2, [], (3, 2), stream=0).shape == (0, 3, 2)


def test_negative_seed_is_refused():
    with pytest.raises(OverflowError):
        uniforms(-1, 0, [0], (1,), stream=0)
