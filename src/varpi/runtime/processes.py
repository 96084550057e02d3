"""One process or many: the same recipe under `varpi train` and under `torchrun -m varpi train`."""

import os
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist

from varpi.errors import VarpiError


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun describes them."""

    rank: int
    size: int
    device: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the processes, in float64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: int) -> list[int]:
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(values, torch.tensor(value, device=self.device))
        return [int(gathered) for gathered in values]

    def max(self, value: float) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()


def choose_device(device: str | None) -> str:
    """`device`, or when it is None CUDA where there is any; raises VarpiError unless this machine has it."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise VarpiError(f"device {device!r}: must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        found = f"only {count} CUDA device(s)" if count else "no CUDA device"
        raise VarpiError(f"device {device}: this machine has {found} that torch can use; try --device cpu")
    return device


def join_world(device: str | None) -> World:
    """Join the processes that torchrun started, or be the only one. `device` None: CUDA when there is any."""
    device = choose_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    return World(dist.get_rank(), size, device)


def leave_world() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def autocast(device: str | torch.device, precision: str) -> torch.autocast:
    """bf16 autocast when the recipe asks for it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
