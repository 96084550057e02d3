"""One process or many: the same recipe under `varpi train` and under `torchrun -m varpi train`."""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from varpi.errors import VarpiError
from varpi.runtime.files import line
from varpi.runtime.memory import keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, as torchrun describes them."""

    rank: int
    size: int
    device: str
    per_node: int = 1
    """Of them on this machine, each next to the other by rank."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by the main process alone; what it raises there ends the others by a VarpiError."""
        if self.size == 1:
            return work()
        problem: Exception | None = None
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                problem = error
                outcome[1] = error.args if isinstance(error, VarpiError) else (f"main process: {line(error)}",)
        dist.broadcast_object_list(outcome, device=torch.device(self.device))
        if problem is not None:
            raise problem
        if outcome[1] is not None:
            raise VarpiError(*outcome[1])
        return outcome[0]

    def together(self, work: Callable[[], None]) -> None:
        """Work on every process; what fails on one fails on all, so that none waits for it for ever.

        Raises:
            VarpiError: on every process, with the message of the first that failed.
        """
        problem: VarpiError | None = None
        try:
            work()
        except VarpiError as error:
            problem = error
        message = None if problem is None else str(problem)
        messages: list[Any] = [message] * self.size
        if self.size > 1:
            dist.all_gather_object(messages, message)
        first = next((message for message in messages if message is not None), None)
        if first is not None:
            raise VarpiError(first) from problem

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the processes, in float64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def max(self, value: float) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()


def choose_device(device: str | None) -> str:
    """`device`, or when it is None CUDA where there is any; raises VarpiError unless this machine has it.

    A process that is to compute on the CPU keeps the memory that it frees from now on.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
        return device
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise VarpiError(f"device {device!r}: must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        found = f"only {count} CUDA device(s)" if count else "no CUDA device"
        raise VarpiError(f"device {device}: this machine has {found} that torch can use; try --device cpu")
    return device


def find_world(device: str | None) -> World:
    """The processes that torchrun started, which need not meet: this one's place among them. `device` as below."""
    device = choose_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return World(int(os.environ["RANK"]), size, device, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def join_world(device: str | None) -> World:
    """Join the processes that torchrun started, or be the only one. `device` None: CUDA when there is any."""
    world = find_world(device)
    if world.size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if world.device.startswith("cuda") else "gloo")
    return world


@contextmanager
def joined_world(device: str | None) -> Iterator[World]:
    """`join_world`, and leave it in order: a process that is through waits for the others.

    One that ended while others were still in their last exchange would take them down with it. After an exception there
    is no waiting, for the others may never come. A process group that was there before stays.
    """
    had = dist.is_initialized()
    world = join_world(device)
    try:
        yield world
        world.barrier()
    finally:
        if not had and dist.is_initialized():
            dist.destroy_process_group()


def autocast(device: str | torch.device, precision: str) -> torch.autocast:
    """bf16 autocast when the recipe asks for it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


class StopRequest:
    """Whether SIGTERM or SIGINT asked for an end."""

    def __init__(self) -> None:
        self.signal = 0
        """The signal's number, or 0."""


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once.

    Only the main thread can be told of signals; elsewhere nothing is ever requested.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
