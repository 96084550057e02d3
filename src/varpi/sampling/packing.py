"""Linear layers packed for the CPU's matrix products, for as long as their weights do not change.

A step of generation multiplies few vectors by many weights. As they are stored, torch's product of so few rows reaches
half of what the memory gives; oneDNN reads weights that it has laid out itself nearly at full speed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Meanwhile linear layers on the CPU multiply by packed copies of their weights, meant for `rows` vectors at once.

    Under autocast the copies are in its dtype. Layers on another device, sharded, or of a dtype that oneDNN does not
    have here stay as they are. The copies take as much memory as the layers' weights. Without gradient only; sums are
    added up in another order, so that results differ by rounding.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    try:
        for layer in layers:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else layer.weight.dtype
            if _can_pack(layer, dtype):
                weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype), rows)
                bias = None if layer.bias is None else layer.bias.detach().to(dtype)
                vars(layer)["forward"] = partial(_linear, weight, bias, dtype)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _can_pack(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether it is a plain layer on the CPU, and oneDNN multiplies in this dtype."""
    if type(layer.weight) is not nn.Parameter or layer.weight.device.type != "cpu":
        return False
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _linear(weight: Any, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, "none", [], "")
