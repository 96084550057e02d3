"""Sampling by inversion of the cumulative distribution."""

import pytest
import torch
from scipy import stats

from varpi.errors import VarpiError
from varpi.objective import sample_tokens
from varpi.objective.rollout import invert
from varpi.runtime.randomness import Stream, uniforms

ALMOST_ONE = 1 - 2.0**-24


def test_hand_worked_inversion():
    logits = torch.tensor([0.125, 0.5, 0.0, 0.375]).log().expand(1, 6, 4)
    draws = torch.tensor([0.0, 0.1249, 0.1251, 0.6249, 0.6251, ALMOST_ONE])
    assert sample_tokens(logits, 1, uniforms=draws.reshape(1, 1, 6)).tolist() == [[[0, 0, 1, 1, 3, 3]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distribution_is_the_softmax(dtype: torch.dtype):
    logits = torch.randn(2, 3, 12).to(dtype)
    group_size = 20_000
    samples = sample_tokens(logits, group_size, generator=torch.Generator().manual_seed(5))
    assert samples.shape == (2, group_size, 3)
    expected = logits.double().softmax(-1)
    for image in range(2):
        for position in range(3):
            observed = torch.bincount(samples[image, :, position], minlength=12).numpy()
            assert stats.chisquare(observed, expected[image, position].numpy() * group_size).pvalue > 1e-3


def test_samples_and_positions_are_independent():
    samples = sample_tokens(torch.zeros(1, 2, 2), 40_000).double()[0]
    assert abs(torch.corrcoef(samples.T)[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([samples[:-1, 0], samples[1:, 0]]))[0, 1]) < 0.02


def test_zero_probability_is_never_drawn():
    """Forbidden tokens lie everywhere, first and last too, and draws reach both ends of the interval."""
    torch.manual_seed(1)
    logits = torch.randn(1, 40, 5000) * 3
    logits[..., ::3] = -torch.inf
    logits[..., -10:] = -torch.inf
    draws = torch.rand(1, 50, 40)
    draws[:, 0], draws[:, 1], draws[:, 2] = 0.0, ALMOST_ONE, 1.0
    samples = sample_tokens(logits, 50, uniforms=draws)
    assert logits.softmax(-1).gather(-1, samples.transpose(1, 2)).min() > 0


def test_one_possible_token_is_always_drawn():
    logits = torch.full((1, 3, 7), -torch.inf)
    logits[0, [0, 1, 2], [0, 3, 6]] = 2.0
    draws = torch.tensor([0.0, 0.5, ALMOST_ONE]).reshape(1, 3, 1).expand(1, 3, 3)
    assert (sample_tokens(logits, 3, uniforms=draws) == torch.tensor([0, 3, 6])).all()


def test_micro_batches_draw_what_the_whole_batch_draws():
    logits = torch.randn(6, 5, 32)
    draws = uniforms(0, 1, range(6), (4, 5), stream=Stream.SAMPLES)
    whole = sample_tokens(logits, 4, uniforms=draws)
    parts = [
        sample_tokens(logits[i : i + 2], 4, uniforms=uniforms(0, 1, range(i, i + 2), (4, 5), stream=Stream.SAMPLES))
        for i in (0, 2, 4)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_logits_that_are_no_distribution_still_give_valid_tokens():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1] = torch.nan
    logits[0, 1] = -torch.inf
    samples = sample_tokens(logits, 2)
    assert (samples[:, :, :2] == 3).all()
    assert samples.max() < 4


def test_logits_keep_their_values_and_samples_carry_no_gradient():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    before = logits.detach().clone()
    assert not sample_tokens(logits, 3).requires_grad
    assert torch.equal(logits, before)


def test_bad_arguments_are_refused():
    with pytest.raises(VarpiError, match="group_size is 0"):
        sample_tokens(torch.zeros(1, 2, 4), 0)
    with pytest.raises(VarpiError, match=r"shape \(1, 2, 3\).*\(1, 3, 2\)"):
        sample_tokens(torch.zeros(1, 2, 4), 3, uniforms=torch.rand(1, 2, 3))


def test_draws_follow_the_distribution_and_never_take_the_impossible() -> None:
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    drawn = invert(probabilities, (torch.arange(4096)[None] + 0.5) / 4096)[0]
    assert drawn.bincount(minlength=5).tolist() == [0, 1229, 0, 2867, 0]
    extremes = torch.tensor([[0.0, 1 - 2.0**-24]])
    assert invert(probabilities, extremes).tolist() == [[1, 3]]
    assert invert(torch.full((1, 5), torch.nan), extremes).tolist() == [[4, 4]]
