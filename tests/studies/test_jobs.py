"""Jobs side by side: what their processes are like, and that none is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from varpi.errors import VarpiError
from varpi.recipe import load_recipe
from varpi.studies.jobs import open_pool

PARENT = """
import os, sys, time
from varpi.studies.jobs import open_pool
if __name__ == "__main__":
    with open_pool() as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(100)
"""


def test_a_job_has_one_thread() -> None:
    with open_pool() as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        assert pool.submit(os.getpid).result() != os.getpid()


def test_a_job_that_is_killed_is_told() -> None:
    message = r"one of \d+ processes was killed, for lack of memory perhaps; --jobs 1, or OMP_NUM_THREADS=1"
    with pytest.raises(VarpiError, match=message), open_pool() as pool:
        pool.submit(os.kill, pool.submit(os.getpid).result(), signal.SIGKILL).result()


def test_a_refusal_is_the_callers() -> None:
    with open_pool() as pool:
        refused = pool.submit(load_recipe, "nowhere")
    with pytest.raises(VarpiError, match="nowhere"):
        refused.result()


def test_no_process_outlives_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    deadline = time.monotonic() + 30
    while is_there(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_there(child)


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
