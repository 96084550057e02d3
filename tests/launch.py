"""Several processes of varpi with the environment that torchrun would give them, forked from one that has imported what
they need: the start of each, which is most of a test's time, is paid once.

    python tests/launch.py SIZE ARGUMENTS…

Exits 0 when all did, or with the code of the first that did not.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(size: int, arguments: Sequence[object], *, torchrun: bool = False) -> list[str]:
    """A command of varpi in so many processes, by torchrun itself or by this file."""
    launcher = [__file__, str(size)]
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m", "varpi"]
    return [sys.executable, *launcher, *map(str, arguments), "--device", "cpu"]


def several(size: int, arguments: Sequence[object], *, torchrun: bool = False, nodes: int = 1) -> str:
    """What a command prints in so many processes, on so many nodes as they believe; all do what was asked."""
    launched = command(size, arguments, torchrun=torchrun)
    environment = {**ENVIRONMENT, "LOCAL_WORLD_SIZE": str(size // nodes)}
    done = subprocess.run(launched, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def start(size: int, arguments: list[str]) -> int:
    import varpi.data.image_tokens
    import varpi.evaluation.distribution
    import varpi.samples.writing
    import varpi.training  # noqa: F401
    from varpi.cli.main import main

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(size):
        processes.append(os.fork())
        if not processes[-1]:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return main(arguments)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    raise SystemExit(start(int(sys.argv[1]), sys.argv[2:]))
