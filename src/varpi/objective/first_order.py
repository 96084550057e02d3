"""The first-order expected reward: what every code would be worth at every position, from one gradient of a sample.

A sample's error L is a smooth function of the code vectors that were decoded. Its gradient g at a position makes
g · e_k the linear value of putting code k there, for all K codes at once; the loss is the expected value under the
generator's own distribution, so that its gradient needs no sampled token (after the straight-through estimator,
arXiv 1308.3432, and Taylor's first order in MuProp, arXiv 1511.05176; here over a codebook).

B images, G samples per image, N = h w tokens, C width of a code, K codes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varpi.errors import VarpiError
from varpi.objective.losses import image_slices


def first_order_loss(logits: Tensor, codebook: Tensor, gradients: Tensor) -> Tensor:
    """Σ over positions of Σ_k π(k) g · e_k, mean over images; g is a constant.

    Only the mean over the G samples of g enters, for the loss is linear in it.

    Args:
        logits: (B,N,K), any floating dtype; differentiable. The softmax is taken in float32.
        codebook: (K,C), the vectors that the tokenizer decodes.
        gradients: (B,G,N,C) of the samples' errors.

    Returns:
        scalar.

    Raises:
        VarpiError: shapes that do not belong together.
    """
    batch, num_tokens, num_codes = logits.shape
    fits = gradients.ndim == 4 and gradients.shape[0] == batch and gradients.shape[2] == num_tokens
    if not fits or codebook.shape != (num_codes, gradients.shape[-1]):
        raise VarpiError(
            f"first_order_loss: logits {tuple(logits.shape)}, codebook {tuple(codebook.shape)} and gradients "
            f"{tuple(gradients.shape)} must be (B,N,K), (K,C) and (B,G,N,C)"
        )
    mean = gradients.detach().mean(dim=1).to(codebook.dtype)
    return _ExpectedValue.apply(logits, codebook.detach(), mean)  # pyright: ignore[reportReturnType]  (untyped)


def residual_advantages(rewards: Tensor, gradients: Tensor, vectors: Tensor) -> Tensor:
    """What the first-order values leave to the policy gradient, as leave-one-out advantages (B,G).

    Sample i is held against the linear reward h(x) = -Σ ḡ · e_x, with ḡ the mean gradient of the *other* samples, which
    does not depend on x_i: its advantage is R_i - h(x_i), minus the mean of R_j - h(x_j) over the others. With these
    advantages the policy gradient and that of the expected h together are an unbiased gradient of the expected reward:
    h is a control variate (MuProp, arXiv 1511.05176), and the mean of the G expected h is minus `first_order_loss`.

    Args:
        rewards: (B,G), G >= 2.
        gradients: (B,G,N,C) of the samples' errors, at their own vectors.
        vectors: (B,G,N,C), the code vectors of the samples.

    Raises:
        VarpiError: fewer than two samples in a group.
    """
    group_size = rewards.shape[1]
    if group_size < 2:
        raise VarpiError(f"residual_advantages: rewards have shape {tuple(rewards.shape)}; (B,G) with G >= 2 is needed")
    products = torch.einsum("bjnc,bknc->bjk", gradients.double(), vectors.double())  # gradient of j, sample k
    others = (products.sum(dim=1, keepdim=True) - products) / (group_size - 1)  # [i,k]: mean gradient without i's
    residuals = rewards.double()[:, None] + others
    own = residuals.diagonal(dim1=1, dim2=2)
    return (own - (residuals.sum(dim=2) - own) / (group_size - 1)).to(rewards.dtype)


class _ExpectedValue(torch.autograd.Function):
    """Saves the logits, not their softmax; the backward pass allocates their gradient and nothing else so large."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, codebook: Tensor, gradients: Tensor) -> Tensor:
        ctx.save_for_backward(logits, codebook, gradients)
        total = torch.zeros((), device=logits.device)
        for rows in image_slices(logits):
            expected = logits[rows].softmax(dim=-1, dtype=torch.float32) @ codebook.float()  # (b,N,C)
            total += (expected * gradients[rows].float()).sum()
        return total / len(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, codebook, gradients = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in image_slices(logits):
            # d Σ π_k v_k / d logit_k = π_k (v_k - Σ π v), with v = g E the values of the codes at a position
            probabilities = logits[rows].softmax(dim=-1, dtype=torch.float32)
            values = gradients[rows].float() @ codebook.float().T
            values -= (probabilities * values).sum(dim=-1, keepdim=True)
            grad_logits[rows] = probabilities.mul_(values).mul_(grad_output / len(logits)).to(logits.dtype)
        return grad_logits, None, None
