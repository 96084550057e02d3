"""The long reliability run: kill a training run with SIGKILL again and again, resume it each time, lose nothing.

    python tests/soak.py [--kills 20] [--processes 1 2] [--seed N]

For each number of processes, a run that is never interrupted and one that is killed at random moments, while it starts,
trains or writes a checkpoint; the last resume finishes it. Weights must be equal to the last bit and the logs must hold
the same steps with the same numbers. Prints counts; exits 1 on any difference. Uses a random pair that it makes itself.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiny
from runs import numbers, same, weights

STEPS_PER_LIFE = 6
PATIENCE_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs per variant (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="variants (default: 1 and 2)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments (default: the clock)")
    options = parser.parse_args()
    lost = 0
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            lost += not survives(Path(folder), processes, options.kills, random.Random(options.seed))
    print(f"seed {options.seed}: {len(options.processes)} variants, {lost} lost")
    return int(lost > 0)


def survives(folder: Path, processes: int, kills: int, moments: random.Random) -> bool:
    """Whether a run that is killed `kills` times ends as one that is not."""
    tiny.make(folder)
    steps = STEPS_PER_LIFE * (kills + 1)
    command = ["-m", "varpi", "train", str(folder / "va_pi.yaml"), "--device", "cpu", "--resume"]
    for setting in (f"training.steps={steps}", "training.save_every=2", "validation.every=5", "data.workers=1"):
        command += ["--set", setting]
    if processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *command]

    def start(run: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *command, "--output", str(run)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    through, run = folder / "through", folder / "run"
    if start(through).wait() != 0:
        print(f"{processes} process(es): the uninterrupted run failed")
        return False
    counts = {"starting": 0, "training": 0, "saving": 0}
    for _ in range(kills):
        process = start(run)
        counts[kill_at_random(process, run, moments)] += 1
    code = start(run).wait()
    equal = code == 0 and same(weights(run), weights(through))
    logged = code == 0 and numbers(run) == numbers(through)
    told = ", ".join(f"{count} while {what}" for what, count in counts.items())
    print(
        f"{processes} process(es): {kills} kills ({told}), {steps} steps, exit {code}; "
        f"weights {'bit-identical' if equal else 'DIFFER'}, log {'identical' if logged else 'DIFFERS'}",
        flush=True,
    )
    return equal and logged


def kill_at_random(process: subprocess.Popen[bytes], run: Path, moments: random.Random) -> str:
    """Kill all processes of a run; says what it was doing."""
    kind = moments.random()
    before = lines(run)
    if kind < 0.1:
        time.sleep(moments.uniform(0, 4))
    else:
        steps = moments.randint(1, STEPS_PER_LIFE - 1)
        deadline = time.monotonic() + PATIENCE_SECONDS
        seen = before
        while seen < before + steps and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
            seen = lines(run)
            before = min(before, seen)  # a resume cuts the log back to the checkpoint
        if kind > 0.5:  # wait for a checkpoint that is being written
            while not list(run.glob("checkpoints/.writing-*")) and process.poll() is None:
                if time.monotonic() > deadline:
                    break
        time.sleep(moments.uniform(0, 0.03))
    saving = bool(list(run.glob("checkpoints/.writing-*")))
    trained = lines(run) > before
    for victim in {process.pid, *processes_of(run)}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    process.wait()
    return "saving" if saving else "training" if trained else "starting"


def processes_of(run: Path) -> list[int]:
    """All processes of this run, those that torchrun started in sessions of their own too."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(run).encode() in words:
                found.append(int(entry.name))
    return found


def lines(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
