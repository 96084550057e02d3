"""The jobs of a study, side by side: each in a process with a single thread.

Small models gain little from several threads, and lose a lot where other work shares the cores: every operation then
waits for the slowest of them. Jobs beside each other wait for nothing, and each gives the numbers of one thread.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from threading import Thread

import torch

from varpi.errors import VarpiError

AT_ONCE = 8
"""Jobs at once, half a gigabyte each."""


@contextmanager
def open_pool() -> Iterator[ProcessPoolExecutor]:
    """Processes for jobs, as many as torch would use threads. After an exception, jobs not begun are dropped.

    Raises VarpiError when a process was killed.
    """
    size = min(torch.get_num_threads(), AT_ONCE)
    pool = ProcessPoolExecutor(size, mp_context=get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(cancel_futures=True)
        if not isinstance(error, BrokenProcessPool):
            raise
        raise VarpiError(
            f"one of {size} processes was killed, for lack of memory perhaps; OMP_NUM_THREADS=1 runs one at a time"
        ) from error
    pool.shutdown()


def _begin() -> None:
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process of the pool would wait for jobs for ever if its parent were killed."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
