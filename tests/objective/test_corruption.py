"""Context noise, Eq. 28 and the released variant."""

import pytest
import torch
from scipy import stats

from varpi.errors import VarpiError
from varpi.objective import corrupt

TOKENS = torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1]])


def test_hand_worked():
    flips = torch.tensor([[0.0, 0.49, 0.5, 0.9], [0.1, 0.1, 0.1, 0.1]])
    choices = torch.tensor([[0.0, 0.34, 0.0, 0.0], [0.0, 0.99, 0.99, 0.4]])
    uniforms = torch.stack([flips, choices], dim=-1)
    # K = 4: floor(3 u), then one up when at or above the true token.
    assert corrupt(TOKENS, 0.5, 4, uniforms=uniforms).tolist() == [[1, 2, 2, 3], [0, 2, 3, 2]]
    # K = 4, true token included: floor(4 u).
    released = corrupt(TOKENS, 0.5, 4, uniforms=uniforms, exclude_true=False)
    assert released.tolist() == [[0, 1, 2, 3], [0, 3, 3, 1]]


def test_rate_zero_is_the_identity_and_the_input_is_left_alone():
    before = TOKENS.clone()
    assert torch.equal(corrupt(TOKENS, 0.0, 4, uniforms=torch.zeros(2, 4, 2)), TOKENS)
    corrupt(TOKENS, 1.0, 4)
    assert torch.equal(TOKENS, before)


@pytest.mark.parametrize("vocab_size", [2, 5, 16384])
def test_rate_one_never_keeps_the_true_token(vocab_size: int):
    tokens = torch.randint(vocab_size, (50, 200))
    noisy = corrupt(tokens, 1.0, vocab_size)
    assert (noisy != tokens).all()
    assert noisy.min() >= 0
    assert noisy.max() < vocab_size


def test_largest_uniform_stays_inside_the_vocabulary():
    last = torch.full((1, 2, 2), 1 - 2.0**-24)
    tokens = torch.tensor([[0, 2**24 - 1]])
    assert corrupt(tokens, 1.0, 2**24, uniforms=last).tolist() == [[2**24 - 1, 2**24 - 2]]


def test_paper_kernel_and_released_kernel_have_their_distributions():
    """True token 1 of 5, rate 0.6: paper 0.4 to stay and 0.15 each; released 0.4 + 0.12 and 0.12 each."""
    count = 40_000
    tokens = torch.ones(count, 1, dtype=torch.int64)
    for exclude_true, expected in ((True, [0.15, 0.4, 0.15, 0.15, 0.15]), (False, [0.12, 0.52, 0.12, 0.12, 0.12])):
        drawn = corrupt(tokens, 0.6, 5, generator=torch.Generator().manual_seed(1), exclude_true=exclude_true)
        observed = torch.bincount(drawn.flatten(), minlength=5).numpy()
        assert stats.chisquare(observed, [p * count for p in expected]).pvalue > 0.01
        other = [0.12, 0.52, 0.12, 0.12, 0.12] if exclude_true else [0.15, 0.4, 0.15, 0.15, 0.15]
        assert stats.chisquare(observed, [p * count for p in other]).pvalue < 1e-6


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rate_outside_the_unit_interval_is_refused(rate: float):
    with pytest.raises(VarpiError, match=r"rate is .*must be in \[0, 1\]"):
        corrupt(TOKENS, rate, 4)


def test_wrong_shapes_and_vocabularies_are_refused():
    with pytest.raises(VarpiError, match=r"shape \(2, 4\)"):
        corrupt(TOKENS, 0.5, 4, uniforms=torch.rand(2, 4))
    with pytest.raises(VarpiError, match="vocab_size is 1"):
        corrupt(TOKENS, 0.5, 1)
