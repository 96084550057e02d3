"""Context noise: the corrupted prefix x̃* that makes the teacher-forced context resemble the model's own (Eq. 28)."""

import torch
from torch import Tensor

from varpi.errors import VarpiError


def corrupt(
    tokens: Tensor,
    rate: float,
    vocab_size: int,
    *,
    uniforms: Tensor | None = None,
    generator: torch.Generator | None = None,
    exclude_true: bool = True,
) -> Tensor:
    """Replace each token with probability `rate` (the paper's ξ) by a uniformly drawn one.

    Args:
        tokens: int64 (B,N) in [0, vocab_size).
        rate: probability of a replacement, in [0,1].
        vocab_size: size of the codebook, K in the paper; at least 2.
        uniforms: (B,N,2) in [0,1), whether and by what to replace; drawn from `generator` when absent.
        generator: on the tokens' device; the global one when absent. Ignored when `uniforms` are given.
        exclude_true: True draws among the K-1 other tokens (VA-π Eq. 28), so that ξ is the rate of change;
            False draws among all K, as the released code does, so that the rate of change is ξ(1-1/K).

    Returns:
        int64 (B,N).

    Raises:
        VarpiError: rate outside [0,1], vocab_size below 2, or uniforms of another shape.
    """
    if not 0 <= rate <= 1:
        raise VarpiError(f"corrupt: the context noise rate is {rate}; it must be in [0, 1]")
    if vocab_size < 2:
        raise VarpiError(f"corrupt: vocab_size is {vocab_size}; a replacement needs at least 2 tokens")
    shape = (*tokens.shape, 2)
    if uniforms is None:
        uniforms = torch.rand(shape, generator=generator, device=tokens.device)
    elif uniforms.shape != shape:
        raise VarpiError(f"corrupt: uniforms have shape {tuple(uniforms.shape)}; tokens need {shape}")
    uniforms = uniforms.to(tokens.device)

    choices = vocab_size - 1 if exclude_true else vocab_size
    # The product can round up to `choices` itself.
    replacement = (uniforms[..., 1] * choices).long().clamp_(max=choices - 1)
    if exclude_true:
        replacement += replacement >= tokens  # skip over the true token
    return torch.where(uniforms[..., 0] < rate, replacement, tokens)
