"""Group advantages, Eq. 4."""

import math

import pytest
import torch
from golden import golden

from varpi.errors import VarpiError
from varpi.objective import group_advantages, local_advantages


def test_hand_worked():
    # Means 2 and 0; unbiased variances 1 and (4 + 4) / 2 = 4.
    rewards = torch.tensor([[1.0, 2.0, 3.0], [-2.0, 2.0, 0.0]])
    assert torch.allclose(group_advantages(rewards), torch.tensor([[-1.0, 0.0, 1.0], [-1.0, 1.0, 0.0]]))


def test_other_baselines_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0]])  # mean 3, unbiased variance 7; means of the others 4, 3.5, 1.5
    plain = group_advantages(rewards, scale_by_std=False)
    assert plain.tolist() == [[-2.0, -1.0, 3.0]]
    assert group_advantages(rewards, scale_by_std=False, baseline="leave_one_out").tolist() == [[-3.0, -1.5, 4.5]]
    scaled = group_advantages(rewards, baseline="leave_one_out")
    torch.testing.assert_close(scaled, torch.tensor([[-3.0, -1.5, 4.5]]) / math.sqrt(7))
    maps = rewards[..., None].expand(1, 3, 4)
    local = local_advantages(maps, scale_by_std=False, baseline="leave_one_out")
    torch.testing.assert_close(local, torch.tensor([-3.0, -1.5, 4.5]).view(1, 3, 1).expand(1, 3, 4))


def test_clip_acts_on_both_sides():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 8.0], [0.0, 0.0, 0.0, -8.0]])
    # Mean 2, unbiased standard deviation 4: -0.5 and 1.5.
    expected = torch.tensor([[-0.5, -0.5, -0.5, 1.0], [0.5, 0.5, 0.5, -1.0]])
    assert torch.allclose(group_advantages(rewards, clip=1.0), expected)


def test_unbiased_score_is_bounded_at_eight_samples():
    """(G-1)/√G = 2.475 at G = 8: the default clip of 5 cannot act (SPEC §4.1)."""
    rewards = torch.zeros(1, 8)
    rewards[0, 0] = 1e4
    assert group_advantages(rewards)[0, 0].item() == pytest.approx(7 / math.sqrt(8), rel=1e-5)


@pytest.mark.parametrize("group_size", range(2, 18))
@pytest.mark.parametrize("value", [0.0, 0.1, -0.3, 1e-9, 12345.678])
def test_equal_rewards_give_exact_zeros(value: float, group_size: int):
    assert (group_advantages(torch.full((3, group_size), value)) == 0).all()


def test_rewards_within_rounding_are_equal():
    """Differences of 3e-7, left by decoding in batches of other sizes, once became advantages of 2.2."""
    rewards = torch.full((4, 8), -0.5)
    rewards[0, 0] += 3e-7
    rewards[1, 3] -= 7e-6  # 0.92 of SAME * 0.5
    rewards[2, 3] -= 8e-6  # 1.05 of it: a difference
    rewards[3, 3] = 0.5
    advantages = group_advantages(rewards)
    assert (advantages[:2] == 0).all()
    # One of eight that differs: its distance from the mean is 7/8, the deviation 1/√8 of the difference.
    expected = torch.full((2, 8), 1 / math.sqrt(8))
    expected[:, 3] = -7 / math.sqrt(8)
    expected[1] *= -1
    assert torch.allclose(advantages[2:], expected, atol=9e-3)  # eps 1e-8 against a deviation of 2.8e-6


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e12])
def test_what_counts_as_equal_grows_with_the_rewards(scale: float):
    rewards = scale * torch.tensor([[1.0, 1.0, 1.0 + 1e-5], [1.0, 1.0, 1.0 + 2e-5]])
    first, second = group_advantages(rewards, eps=0)
    assert (first == 0).all()
    assert second[2].item() == pytest.approx(2 / math.sqrt(3), rel=0.02)


def test_float64_sums():
    """Far from 0 the mean of a group is no float32 number: there the result would be off by 4e-4."""
    advantages = group_advantages(torch.tensor([[4096.0, 4096.25, 4096.75]]))
    # Mean 1/3 above the first; deviations -4/12, -1/12, 5/12; variance (16 + 1 + 25) / 144 / 2 = 21 / 144.
    expected = torch.tensor([[-4.0, -1.0, 5.0]]) / math.sqrt(21)
    assert torch.allclose(advantages, expected, atol=1e-6, rtol=0)
    assert advantages.dtype == torch.float32


def test_groups_do_not_influence_each_other():
    rewards = torch.randn(5, 8)
    assert torch.equal(group_advantages(rewards)[2:3], group_advantages(rewards[2:3]))


def test_a_nan_stays_visible_in_its_group_only():
    rewards = torch.tensor([[1.0, torch.nan, 1.0], [1.0, 2.0, 3.0]])
    advantages = group_advantages(rewards)
    assert advantages[0].isnan().all()
    assert torch.allclose(advantages[1], torch.tensor([-1.0, 0.0, 1.0]))


def test_one_sample_is_no_group():
    with pytest.raises(VarpiError, match=r"\(4, 1\).*G >= 2"):
        group_advantages(torch.zeros(4, 1))


def test_original_implementation():
    values, _ = golden("llamagen_c2i_small")
    assert torch.allclose(group_advantages(values["rewards"]), values["advantages"], atol=1e-5)


def test_local_advantages_by_hand():
    # Two samples, 2 x 2 tokens: every 3 x 3 neighbourhood, cut off at the border, is the whole grid.
    maps = torch.tensor([[[0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]]])
    expected = torch.tensor([1.0, -1.0]) / math.sqrt(2)  # the z-scores of (1, 0), with the unbiased deviation
    torch.testing.assert_close(local_advantages(maps), expected[None, :, None].expand(1, 2, 4))


def test_local_advantages_see_only_their_neighbourhood():
    maps = torch.zeros(1, 2, 16)
    maps[0, 0, 0] = 1.0  # a corner of 4 x 4: tokens within one row and column of it are better in sample 0
    found = local_advantages(maps)[0].unflatten(1, (4, 4))
    assert (found[0, :2, :2] > 0.7).all()
    assert (found[1, :2, :2] < -0.7).all()
    assert (found[:, 2:] == 0).all()
    assert (found[:, :, 2:] == 0).all()
    with pytest.raises(VarpiError, match="no square grid"):
        local_advantages(torch.zeros(1, 2, 3))
