"""Rollout: G samples per position from the one teacher-forced distribution of an image (VA-π Eq. 7).

B images, G samples per image, N tokens per image, V vocabulary.
"""

import torch
from torch import Tensor

from varpi.errors import VarpiError

_UNIFORM_BITS = 24
_PROBABILITY_BITS = 38  # with _UNIFORM_BITS the products stay below 2**63


@torch.no_grad()
def sample_tokens(
    logits: Tensor, group_size: int, *, uniforms: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Sample every position independently from softmax(logits), G times, by inverting the cumulative distribution.

    One image is processed at a time: the temporary memory does not grow with B.

    Args:
        logits: (B,N,V), any floating dtype; the softmax is taken in float32. -inf forbids a token.
        group_size: G.
        uniforms: (B,G,N) in [0,1), one per drawn token; drawn from `generator` when absent.
        generator: on the logits' device; the global one when absent. Ignored when `uniforms` are given.

    Returns:
        int64 (B,G,N). A position whose logits are not a distribution (NaN, +inf) gives token V-1: a valid index, so
        that decoding goes on and the loss, not a crash in a kernel, reports the numbers.

    Raises:
        VarpiError: group_size below 1 or uniforms of another shape.
    """
    if group_size < 1:
        raise VarpiError(f"sample_tokens: group_size is {group_size}; it must be >= 1")
    batch, num_tokens, _ = logits.shape
    shape = (batch, group_size, num_tokens)
    if uniforms is None:
        uniforms = torch.rand(shape, generator=generator, device=logits.device)
    elif uniforms.shape != shape:
        raise VarpiError(f"sample_tokens: uniforms have shape {tuple(uniforms.shape)}; they need {shape}")

    samples = torch.empty(shape, dtype=torch.int64, device=logits.device)
    for image_samples, image_logits, image_uniforms in zip(samples, logits, uniforms.to(logits.device), strict=True):
        image_samples.copy_(invert(image_logits.softmax(dim=-1, dtype=torch.float32), image_uniforms.T).T)
    return samples


def invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens int64 (R,K): the inverse cumulative distribution of probabilities (R,V) at uniforms (R,K) in [0,1).

    Summed in integers, probabilities in units of 2**-38 and uniform numbers of 2**-24: such sums do not depend on the
    order of addition, so a token of probability zero cannot be drawn through rounding, on any device. A row of NaN
    gives token V-1.
    """
    scaled = probabilities.nan_to_num(nan=0.0).mul_(2.0**_PROBABILITY_BITS)
    cumulative = scaled.long().cumsum(dim=-1)
    quantile = (uniforms.contiguous() * 2.0**_UNIFORM_BITS).long().clamp_(max=2**_UNIFORM_BITS - 1)
    threshold = (quantile * cumulative[:, -1:]) >> _UNIFORM_BITS  # always below the total
    return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[-1] - 1)
