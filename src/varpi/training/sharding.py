"""Sharding a model over the processes of a run by FSDP2 (`fully_shard`), on any device."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from varpi.errors import VarpiError
from varpi.generators import Generator
from varpi.runtime.processes import World


def shard(model: nn.Module, world: World, over: int | None = None) -> None:
    """Shard a model's parameters over the processes, in place; block by block when it is a generator.

    Parameters are gathered as they are, and gradients summed in float32. In a bf16 run autocast alone decides what is
    computed in bf16, as in one process: FSDP's own casting would also round the residual stream, the norms and the
    rotary table. It costs twice the traffic, and without gradient checkpointing a bf16 copy of the weights meanwhile.

    What is frozen is sharded by itself, so that it is gathered where it is used, and not at all where it is not:
    Janus-Pro's half that understands images would otherwise come with the embeddings in every pass.

    over: how many neighbouring processes share a model; each such group has all of it, and gradients are summed over
        the groups (HSDP). None: all processes.

    Raises:
        VarpiError: the processes do not divide into such groups.
    """
    if world.size == 1:
        return
    over = over or world.size
    if world.size % over:
        raise VarpiError(f"training.shard_over is {over}; it must divide the number of processes, {world.size}")
    kind = world.device.partition(":")[0]
    if over == world.size:
        mesh = init_device_mesh(kind, (world.size,))
    else:
        mesh = init_device_mesh(kind, (world.size // over, over), mesh_dim_names=("replicate", "shard"))
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    if isinstance(model, Generator):
        for block in model.blocks:
            fully_shard(block, **settings)
        for part in _frozen_parts(model):
            fully_shard(part, **settings)
    fully_shard(model, **settings)
    for name in ("logits", "prefill", "decode_step", "encode", "decode"):
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)


def _frozen_parts(model: Generator) -> Iterator[nn.Module]:
    """The largest modules beside the blocks that are frozen and share no parameter with another; of a trained model."""
    blocks = {id(block) for block in model.blocks}
    users: Counter[int] = Counter()
    for module in model.modules():
        users.update(id(parameter) for parameter in module.parameters(recurse=False))

    def search(module: nn.Module) -> Iterator[nn.Module]:
        own = list(module.parameters())
        if id(module) in blocks or not own:
            return
        if all(not parameter.requires_grad and users[id(parameter)] == 1 for parameter in own):
            yield module
        else:
            for child in module.children():
                yield from search(child)

    if any(parameter.requires_grad for parameter in model.parameters()):
        yield from search(model)


def gradient_norm(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients so that their total norm is at most `limit`; the norm before, a scalar."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a tensor that is whole, as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
