"""AdamW and its learning rate."""

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from varpi.recipe import Optimizer
from varpi.training.sharding import local


class AdamW16(torch.optim.Optimizer):
    """AdamW whose moments are kept in bfloat16: 4 bytes for each weight in place of 8.

    Everything is computed in float32; the new moments are rounded up or down at random, by how near they are, before
    they are kept and used. Rounded to the nearest, the second moment would stand still: a step changes it by a
    thousandth (1 - β2), bfloat16 tells apart no less than 1 in 256. The draws are keyed by seed, step, parameter and
    process, so that a resume goes on with them.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int = 0,
        part: int = 0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._key = f"{seed} {part}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all parameters that have a gradient, one after another."""
        numbered = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        for number, (group, parameter) in enumerate(numbered):
            if parameter.grad is not None:
                self._update(group, local(parameter), local(parameter.grad).float(), self.state[parameter], number)

    def _update(self, group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Any], number: int) -> None:
        (beta1, beta2), rate = group["betas"], group["lr"]
        state["step"] += 1
        step = state["step"].item()
        first, second = local(state["exp_avg"]), local(state["exp_avg_sq"])
        mean = first.float().lerp_(grad, 1 - beta1)
        square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        seed = hashlib.sha256(f"{self._key} {step:.0f} {number}".encode()).digest()[:7]
        draws = torch.Generator(weight.device).manual_seed(int.from_bytes(seed))
        first.copy_(_rounded(mean, draws))
        second.copy_(_rounded(square, draws))
        weight.mul_(1 - rate * group["weight_decay"])
        scale = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        weight.addcdiv_(mean, scale, value=-rate / (1 - beta1**step))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which gives the moments the type of their weights
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def _rounded(values: Tensor, draws: torch.Generator) -> Tensor:
    """Float32 to the bfloat16 above or below, one of them at random, so that the mean is right; overwrites `values`."""
    bits = values.view(torch.int32)
    bits += torch.randint(1 << 16, bits.shape, generator=draws, dtype=torch.int32, device=bits.device)
    return bits.bitwise_and_(-1 << 16).view(torch.float32).to(torch.bfloat16)


def make_optimizer(model: nn.Module, settings: Optimizer, *, seed: int = 0, part: int = 0) -> torch.optim.Optimizer:
    """AdamW that decays matrices and embeddings but neither norms nor biases.

    So does the released code for LlamaGen (by the names of its norms; LlamaGen has no biases). Its Janus trainer decays
    everything instead, norms and biases included: that is not reproduced.

    seed, part: of the run, and the number of the part of the model that is here: for what `state_precision: bf16`
        draws, alike in processes that hold the same part.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    shared: Any = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps}
    optimizer, kind = torch.optim.AdamW(groups, **shared), torch.float32
    if settings.state_precision == "bf16":
        optimizer, kind = AdamW16(groups, **shared, seed=seed, part=part), torch.bfloat16
    # Not left to the first step: a checkpoint may come before it, when the first updates are skipped.
    for p in parameters:
        moments = {name: torch.zeros_like(p, dtype=kind, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The rate of update number `step` (from 0) of `steps`."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "cosine" and step >= settings.warmup_steps:
        done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
    return rate
