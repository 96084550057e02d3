"""The guided prior: the frozen start model's own guided distribution as the target of the prior term.

Where the paper's prior (VA-π Eq. 9) pulls towards one true token, this one pulls towards softmax(u + s (c - u)) of the
frozen start under the same context, c its conditional and u its null logits: classifier-free guidance (arXiv
2207.12598) distilled into the weights (as arXiv 2210.03142 does for diffusion), so that sampling needs no second pass.

B images, N tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varpi.errors import VarpiError
from varpi.objective.losses import image_slices


def guide(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """u + s (c - u): logits (B,N,V) and (B,N,V) to float32 (B,N,V). Scale 1 is the conditional model itself."""
    return torch.lerp(null.float(), conditional.float(), scale)


def guided_prior(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Cross-entropy of softmax(logits) under softmax(target_logits).

    Its gradient is that of KL(target || current), from which it differs by the target's entropy, a constant.

    Args:
        logits: (B,N,V), any floating dtype; differentiable.
        target_logits: (B,N,V); a constant.

    Returns:
        scalar, mean over B and N, in nats.

    Raises:
        VarpiError: shapes that do not belong together.
    """
    if logits.shape != target_logits.shape:
        raise VarpiError(
            f"guided_prior: logits {tuple(logits.shape)} and target_logits {tuple(target_logits.shape)} must be alike"
        )
    return _SoftCrossEntropy.apply(logits, target_logits.detach())  # pyright: ignore[reportReturnType]  (untyped)


class _SoftCrossEntropy(torch.autograd.Function):
    """Saves the logits, not their softmax; the backward pass allocates a gradient and nothing else so large."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target_logits)
        total = torch.zeros((), device=logits.device)
        for rows in image_slices(logits):
            target = target_logits[rows].softmax(dim=-1, dtype=torch.float32)
            total -= (target * logits[rows].log_softmax(dim=-1, dtype=torch.float32)).sum()
        return total / (logits.shape[0] * logits.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, target_logits = ctx.saved_tensors
        scale = grad_output / (logits.shape[0] * logits.shape[1])
        grad_logits = torch.empty_like(logits)
        for rows in image_slices(logits):
            difference = logits[rows].softmax(dim=-1, dtype=torch.float32)
            difference -= target_logits[rows].softmax(dim=-1, dtype=torch.float32)
            grad_logits[rows] = difference.mul_(scale).to(logits.dtype)
        return grad_logits, None
