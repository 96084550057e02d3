"""Sharding a model over the processes of a run by FSDP2 (`fully_shard`), on any device."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from varpi.errors import VarpiError
from varpi.generators import Generator
from varpi.runtime.processes import World
from varpi.runtime.sources import few


def shard(model: nn.Module, world: World, over: Literal["all", "node"] = "all") -> None:
    """Shard a model's parameters over the processes, in place; block by block when it is a generator.

    over: `all` processes, or those of a `node`, so that each node has the whole model (HSDP). Raises VarpiError when
        nodes have unequal numbers of processes.

    Parameters are gathered as they are, and gradients summed in float32. In a bf16 run autocast alone decides what is
    computed in bf16, as in one process: FSDP's own casting would also round the residual stream, the norms and the
    rotary table. It costs twice the traffic, and without gradient checkpointing a bf16 copy of the weights meanwhile.
    """
    if world.size == 1:
        return
    parts = world.size
    if over == "node":
        found = sorted({*world.gather(world.per_node)})
        if len(found) > 1:
            raise VarpiError(f"training.shard_over: node needs equal nodes; here they have {few(found)} processes")
        parts = world.per_node
    kind, copies = world.device.partition(":")[0], world.size // parts
    mesh = init_device_mesh(kind, (copies, parts), mesh_dim_names=("copy", "part"))
    mesh = mesh if copies > 1 else mesh["part"]
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    if isinstance(model, Generator):
        for block in model.blocks:
            fully_shard(block, **settings)
    fully_shard(model, **settings)
    for name in ("logits", "prefill", "decode_step", "encode", "decode", "maps"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def part_held(world: World, over: Literal["all", "node"]) -> int:
    """The number of the part of a model that this process holds once it is sharded; copies of a part share it."""
    return world.rank if over == "all" else world.rank % world.per_node


def exchange_gradients(model: nn.Module, exchange: bool) -> None:
    """Whether the next backward pass adds up gradients between copies of the model, which one of an update must."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(exchange)


def gradient_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients so that their total norm is at most `limit`; the norm before, a scalar."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a tensor that is whole, as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
