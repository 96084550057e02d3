"""Losses on the generator's logits: the clipped policy term, the cross-entropy prior, and the k3 KL prior.

B images, G samples per image, K rows of tokens per image, N tokens per row, V vocabulary. Logits are (B,N,V) whatever
the number of samples: at N = 576 and V = 16384 they are the largest tensor of a step, so nothing here makes a second
copy of them in the forward pass, and temporaries cover a few images at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varpi.errors import VarpiError

_TEMPORARY_ELEMENTS = 1 << 24


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token under softmax(logits), for K rows of tokens that share one image's logits.

    Equal to log_softmax and gather, but saves the logits themselves and one number per position instead of a float32
    log-softmax; the backward pass allocates the logits' gradient and nothing else of its size. To have a single such
    gradient, score samples and clean targets in one call: `tokens = cat([samples, targets[:, None]], dim=1)`.

    Args:
        logits: (B,N,V), any floating dtype; differentiable.
        tokens: int64 (B,K,N) in [0,V).

    Returns:
        float32 (B,K,N) (float64 for float64 logits).

    Raises:
        VarpiError: shapes that do not belong together.
    """
    if tokens.ndim != 3 or (tokens.shape[0], tokens.shape[2]) != tuple(logits.shape[:2]):
        raise VarpiError(
            f"token_log_probs: tokens have shape {tuple(tokens.shape)}; (B,K,N) that fits "
            f"logits (B,N,V) = {tuple(logits.shape)} is needed"
        )
    return _TokenLogProbs.apply(logits, tokens)  # pyright: ignore[reportReturnType]  (apply is untyped)


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_range: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy objective (VA-π Eq. 11) with the importance ratio ρ taken per token.

    loss = mean over B, G and N of max(-A ρ, -A clip(ρ, 1-ε, 1+ε)), ρ = exp(log_probs - old_log_probs). Where the two
    log-probabilities are the same numbers ρ is exactly 1.

    Args:
        log_probs: (B,G,N) of the samples under the current generator; differentiable.
        old_log_probs: (B,G,N) under the generator that drew them; a constant.
        advantages: (B,G), or (B,G,N) to credit tokens individually.
        clip_range: ε.

    Returns:
        The scalar loss, and detached scalars: "ratio_mean" (mean ρ), "clip_fraction" (share of tokens with |ρ-1| > ε),
        "approx_kl" (mean of ρ - 1 - log ρ, an estimate of KL(old || new)).

    Raises:
        VarpiError: shapes that do not belong together.
    """
    if old_log_probs.shape != log_probs.shape or advantages.shape not in (log_probs.shape, log_probs.shape[:2]):
        raise VarpiError(
            f"policy_loss: log_probs {tuple(log_probs.shape)}, old_log_probs {tuple(old_log_probs.shape)} and "
            f"advantages {tuple(advantages.shape)} must be (B,G,N), (B,G,N) and (B,G) or (B,G,N)"
        )
    if advantages.ndim == 2:
        advantages = advantages.unsqueeze(-1)
    log_ratio = log_probs - old_log_probs.detach()
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    with torch.no_grad():
        metrics = {
            "ratio_mean": ratio.mean(),
            "clip_fraction": ((ratio - 1).abs() > clip_range).float().mean(),
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).mean(),
        }
    return loss, metrics


def prior_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the clean tokens under the noisy context (VA-π Eq. 9): the β term of Eq. 11.

    Args:
        logits: (B,N,V) computed from the corrupted tokens.
        targets: int64 (B,N) clean tokens.

    Returns:
        scalar, mean over B and N, in nats.
    """
    return -token_log_probs(logits, targets.unsqueeze(1)).mean()


def kl_prior(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """The k3 estimate of KL(current || reference) on tokens drawn from the current generator.

    mean of exp(Δ) - Δ - 1 with Δ = reference_log_probs - log_probs; every term is nonnegative.

    Its value estimates KL(current || reference), its gradient that of KL(reference || current), as in the released
    code: with the tokens held fixed, the mean of (1 - exp(Δ)) ∇log_probs is -Σ reference(x) ∇log current(x). Both are
    least where the two agree, but this one pulls towards all that the reference does, not towards its modes.

    Args:
        log_probs: (B,G,N); differentiable.
        reference_log_probs: (B,G,N) under the frozen reference; a constant.

    Returns:
        scalar.
    """
    delta = reference_log_probs.detach() - log_probs
    return (torch.expm1(delta) - delta).mean()


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """Mean entropy in nats of softmax(logits) over all positions: (B,N,V) -> scalar, without gradient."""
    total = torch.zeros((), device=logits.device)
    for rows in image_slices(logits):
        total += torch.special.entr(logits[rows].softmax(dim=-1, dtype=torch.float32)).sum()
    return total / (logits.shape[0] * logits.shape[1])


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normalizer = torch.empty(logits.shape[:2], dtype=dtype, device=logits.device)
        for rows in image_slices(logits):
            normalizer[rows] = logits[rows].to(dtype).logsumexp(dim=-1)
        ctx.save_for_backward(logits, tokens, normalizer)
        chosen = logits.gather(-1, tokens.transpose(1, 2)).to(dtype)  # (B,N,K)
        return (chosen - normalizer.unsqueeze(-1)).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, tokens, normalizer = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in image_slices(logits):
            # d log p(x_k) / d logits = onehot(x_k) - softmax, summed over k with the incoming weights.
            grad = (logits[rows].to(normalizer.dtype) - normalizer[rows].unsqueeze(-1)).exp_()
            grad.mul_(-grad_output[rows].sum(dim=1).unsqueeze(-1))
            # One k at a time: no index repeats within a call, so the sum has a fixed order on a GPU too.
            for k in range(tokens.shape[1]):
                grad.scatter_add_(-1, tokens[rows, k].unsqueeze(-1), grad_output[rows, k].unsqueeze(-1))
            grad_logits[rows] = grad
        return grad_logits, None


def image_slices(logits: Tensor) -> Iterator[slice]:
    """Slices of the batch, each of at most _TEMPORARY_ELEMENTS logits (but at least one image)."""
    batch, num_tokens, vocab_size = logits.shape
    step = max(1, _TEMPORARY_ELEMENTS // (num_tokens * vocab_size))
    for first in range(0, batch, step):
        yield slice(first, first + step)
