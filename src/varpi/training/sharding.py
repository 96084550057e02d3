"""Sharding a model over the processes of a run by FSDP2 (`fully_shard`), on any device."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from varpi.generators import Generator
from varpi.runtime.processes import World


def shard(model: nn.Module, world: World) -> None:
    """Shard a model's parameters over the processes, in place; block by block when it is a generator.

    Parameters are gathered as they are, and gradients summed in float32. In a bf16 run autocast alone decides what is
    computed in bf16, as in one process: FSDP's own casting would also round the residual stream, the norms and the
    rotary table. It costs twice the traffic, and without gradient checkpointing a bf16 copy of the weights meanwhile.
    """
    if world.size == 1:
        return
    mesh = init_device_mesh(world.device.partition(":")[0], (world.size,))
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    if isinstance(model, Generator):
        for block in model.blocks:
            fully_shard(block, **settings)
    fully_shard(model, **settings)
    for name in ("logits", "prefill", "decode_step", "encode", "decode"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def gradient_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients so that their total norm is at most `limit`; the norm before, a scalar."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a tensor that is whole, as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
