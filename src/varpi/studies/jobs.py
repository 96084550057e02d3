"""The jobs of a study, side by side: each in a process with a single thread.

Small models gain little from several threads, and lose a lot where other work shares the cores: every operation then
waits for the slowest of them. Jobs beside each other wait for nothing, and each gives the numbers of one thread.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from threading import Thread

import torch

from varpi.errors import VarpiError

AT_ONCE = 8
"""Jobs at once, half a gigabyte each."""


@contextmanager
def open_pool(size: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes for jobs, `size` or else as many as torch would use threads.

    After an exception, jobs not begun are dropped, and those under way are told to stop by SIGTERM.

    Raises VarpiError when a process was killed.
    """
    size = size or min(torch.get_num_threads(), AT_ONCE)
    context = get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)  # closed on this side, it can be read on theirs
    pool = ProcessPoolExecutor(size, mp_context=context, initializer=_begin, initargs=(theirs,))
    try:
        yield pool
    except BaseException as error:
        ours.close()
        pool.shutdown(cancel_futures=True)
        if not isinstance(error, BrokenProcessPool):
            raise
        raise VarpiError(
            f"one of {size} processes was killed, for lack of memory perhaps; --jobs 1, or OMP_NUM_THREADS=1 for the "
            "demo, runs one at a time"
        ) from error
    finally:
        pool.shutdown()
        ours.close()
        theirs.close()


def _begin(stop: Connection) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent decides
    Thread(target=_watch, args=(stop,), daemon=True).start()


def _watch(stop: Connection) -> None:
    """End when told to. A process of the pool would wait for jobs for ever if its parent were killed."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel, stop])
    if parent.is_alive():
        os.kill(os.getpid(), signal.SIGTERM)  # a training that is under way saves first
        connection.wait([parent.sentinel])
    os._exit(1)
