"""Group-relative advantages (VA-π Eq. 4): a sample is compared with the other samples of its own image."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from varpi.errors import VarpiError

Baseline = Literal["group_mean", "leave_one_out"]
SAME = 128 * torch.finfo(torch.float32).eps
"""Rewards nearer than this share of their size, 1.5e-5, are the same: the very same tokens, decoded in batches of other
sizes, were seen to differ by 18 eps, and one token of hundreds that differs moves a reward a hundred times as much."""


def group_advantages(
    rewards: Tensor,
    *,
    clip: float = 5.0,
    eps: float = 1e-8,
    baseline: Baseline = "group_mean",
    scale_by_std: bool = True,
) -> Tensor:
    """(reward - baseline) / (group standard deviation + eps), clamped; computed in float64.

    The standard deviation is the unbiased one, which bounds the result by (G-1)/√G with the group's mean as the
    baseline: at G = 8 a clip of 5 never acts.

    Args:
        rewards: (B,G) with G >= 2. Non-finite rewards are not hidden: they make their group's advantages NaN, which the
            training loop finds in the loss.
        clip: bound on the absolute value, > 0.
        eps: added to the standard deviation.
        baseline: "group_mean" (Eq. 4), or "leave_one_out": the mean of the other samples, which depends on nothing of
            the one it is for (arXiv 2402.14740). The second is G/(G-1) times the first.
        scale_by_std: False leaves the division out (arXiv 2503.20783), and with it its bias.

    Returns:
        (B,G) of the rewards' dtype; zeros for a group of equals, whose largest and smallest reward differ by at most
        `SAME` times the largest magnitude: dividing by their deviation would make a signal of rounding.

    Raises:
        VarpiError: fewer than two samples in a group.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise VarpiError(f"group_advantages: rewards have shape {tuple(rewards.shape)}; (B,G) with G >= 2 is needed")
    exact = rewards.double()
    scaled = exact - exact.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out":
        scaled = scaled * (rewards.shape[1] / (rewards.shape[1] - 1))
    if scale_by_std:
        scaled = scaled / (exact.std(dim=1, keepdim=True) + eps)
    scaled = scaled.clamp(-clip, clip)
    spread = exact.amax(dim=1, keepdim=True) - exact.amin(dim=1, keepdim=True)
    equal = spread <= SAME * exact.abs().amax(dim=1, keepdim=True)
    return torch.where(equal, 0.0, scaled).to(rewards.dtype)


def local_advantages(
    maps: Tensor,
    *,
    clip: float = 5.0,
    eps: float = 1e-8,
    baseline: Baseline = "group_mean",
    scale_by_std: bool = True,
) -> Tensor:
    """Each token's own advantage: its neighbourhood in one sample against the same place in the group's others.

    The maps are averaged over 3 x 3 tokens, for a token changes the decoded image beyond its own patch, and then
    normalized over the group at every place as `group_advantages` does.

    Args:
        maps: (B,G,N), the rewards' shares of each token's place in a square grid, row-major; G >= 2.
        clip, eps, baseline, scale_by_std: as for `group_advantages`.

    Returns:
        (B,G,N) of the maps' dtype.

    Raises:
        VarpiError: fewer than two samples in a group, or N is no square.
    """
    batch, group_size, num_tokens = maps.shape
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise VarpiError(f"local_advantages: {num_tokens} tokens are no square grid")
    smooth = functional.avg_pool2d(maps.unflatten(2, (side, side)), 3, stride=1, padding=1, count_include_pad=False)
    places = smooth.flatten(2).transpose(1, 2).reshape(-1, group_size)
    advantages = group_advantages(places, clip=clip, eps=eps, baseline=baseline, scale_by_std=scale_by_std)
    return advantages.view(batch, num_tokens, group_size).transpose(1, 2)
