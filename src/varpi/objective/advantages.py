"""Group-relative advantages (VA-π Eq. 4): a sample is compared with the other samples of its own image."""

import torch
from torch import Tensor

from varpi.errors import VarpiError


def group_advantages(rewards: Tensor, *, clip: float = 5.0, eps: float = 1e-8) -> Tensor:
    """(reward - group mean) / (group standard deviation + eps), clamped.

    The standard deviation is the unbiased one, which bounds the result by (G-1)/√G: at G = 8 a clip of 5 never acts.

    Args:
        rewards: (B,G) with G >= 2. Non-finite rewards are not hidden: they make their group's advantages NaN, which the
            training loop finds in the loss.
        clip: bound on the absolute value, > 0.
        eps: added to the standard deviation.

    Returns:
        (B,G) of the rewards' dtype; zeros for a group whose rewards are all equal.

    Raises:
        VarpiError: fewer than two samples in a group.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise VarpiError(f"group_advantages: rewards have shape {tuple(rewards.shape)}; (B,G) with G >= 2 is needed")
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    scaled = (centered / (rewards.std(dim=1, keepdim=True) + eps)).clamp(-clip, clip)
    # The mean of equal numbers may be off by a rounding error as large as eps; without this it would become a signal.
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    return torch.where(equal, 0.0, scaled)
