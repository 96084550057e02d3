"""What the processes of a run do for each other: two gloo processes that print what they got."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from varpi.errors import VarpiError
from varpi.runtime.processes import World, joined_world, stop_request

PROGRAM = """
import time
from varpi.errors import VarpiError
from varpi.runtime.processes import joined_world

def fail(error):
    raise error

with joined_world("cpu") as world:
    got = [world.on_main(lambda: ("made by", world.rank)), world.gather(10 + world.rank), world.max(world.rank)]
    for work in (lambda: fail(VarpiError("one", "two")), lambda: fail(OSError("disk"))):
        try:
            world.on_main(work)
        except (VarpiError, OSError) as error:
            got.append((type(error).__name__, str(error)))
    try:
        world.together(lambda: fail(VarpiError("only here")) if world.rank == 1 else None)
    except VarpiError as error:
        got.append(str(error))
    world.together(lambda: None)
    got.append(world.sum([1.0, world.rank]))
    print(got, flush=True)
    time.sleep(1.5 * world.rank)
    left = time.time()
print(f"{left:.3f} {time.time():.3f}", flush=True)
"""


def test_a_group_that_was_there_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="mine"), joined_world("cpu"):
        raise ValueError("mine")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with joined_world("cpu"):
            pass
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM], env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    (main, main_times), (other, other_times) = (process.communicate()[0].splitlines() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    common = [("made by", 0), [10, 11], 1.0, ("VarpiError", "one\ntwo")]
    assert main == str([*common, ("OSError", "disk"), "only here", [2.0, 1.0]])
    assert other == str([*common, ("VarpiError", "main process: OSError: disk"), "only here", [2.0, 1.0]])
    ready, gone = map(float, main_times.split())
    assert gone - ready > 1  # it waited
    assert gone > float(other_times.split()[0])


def test_one_process() -> None:
    world = World(0, 1, "cpu")
    assert world.on_main(lambda: 7) == 7
    with pytest.raises(VarpiError, match="mine"):
        world.together(lambda: (_ for _ in ()).throw(VarpiError("mine")))


def test_signals_are_noted_and_given_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_request() as stop:
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_thread_is_told_of_no_signal() -> None:
    found = []

    def look() -> None:
        with stop_request() as stop:
            found.append(stop.signal)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [0]
