"""AdamW and its learning rate."""

import math

import torch
from torch import nn

from varpi.recipe import Optimizer


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings but neither norms nor biases.

    So does the released code for LlamaGen (by the names of its norms; LlamaGen has no biases). Its Janus trainer decays
    everything instead, norms and biases included: that is not reproduced.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )
    # Not left to the first step: a checkpoint may come before it, when the first updates are skipped.
    for p in parameters:
        moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The rate of update number `step` (from 0) of `steps`."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "cosine" and step >= settings.warmup_steps:
        done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
    return rate
