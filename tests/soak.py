"""The long reliability run: a training run is killed with SIGKILL again and again, resumed each time, and must end with
the very weights and the very log of a run that nobody touched. Then damaged files of every format (fuzz.py).

    python tests/soak.py        # twenty kills of one process, twenty of two gloo processes, 20 000 damaged files
    python tests/soak.py --kills 5 --processes 1 --cases 0

A life ends at a random moment: while the program starts and loads a checkpoint, in the middle of a step, or while a
checkpoint is being written, which is made likelier than it is. Five more runs of each kind are killed while they write
`model.safetensors`, and a second run in one directory must be refused. Exits 1 when anything was lost.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiny
from training_runs import numbers, same, steps_saved, weights

from varpi.errors import VarpiError
from varpi.training.state import newest_whole

STRIDE = 8
"""A life makes about this many steps at most, so that the last kill comes before the run is through."""
SETTINGS = ("training.save_every=2", "training.micro_batch=4", "data.workers=1", "method.prior=kl")
MODEL_KILLS = 5
PATIENCE = 600.0
"""Seconds after which something hangs."""


class Lost(Exception):
    """The run is not what it should be."""


class Soak:
    def __init__(self, folder: Path, kills: int, processes: int, moments: random.Random) -> None:
        self.pair = folder / "pair"
        self.log = folder / f"output-{processes}.txt"
        self.through, self.run = (folder / f"{name}-{processes}" for name in ("through", "killed"))
        self.kills = kills
        self.processes = processes
        self.moments = moments
        self.steps = (kills + 2) * (STRIDE + 4)

    def start(self, run: Path, steps: int | None = None) -> list[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "varpi", "train", str(self.pair / "va_pi.yaml"), "--output", str(run)]
        for setting in (*SETTINGS, f"training.steps={steps or self.steps}"):
            command += ["--set", setting]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.processes > 1:
            environment |= {"WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        with self.log.open("ab") as log:
            return [
                subprocess.Popen(
                    [*command, "--device", "cpu", "--resume"],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
                for rank in range(self.processes)
            ]

    def finish(self, run: Path, steps: int | None = None) -> float:
        """Let a run come to its end; the seconds until its first new step."""
        begun, before = time.monotonic(), last_step(run)
        processes = self.start(run, steps)
        try:
            while last_step(run) <= before and all(process.poll() is None for process in processes):
                time.sleep(0.01)
            startup = time.monotonic() - begun
            codes = [process.wait(PATIENCE) for process in processes]
        finally:
            stop(processes)
        if any(codes):
            raise Lost(f"exit codes {codes}; see {self.log}")
        return startup

    def kill_once(self, startup: float) -> str:
        """One life of the run; where it ended."""
        place = self.moments.choices(("start", "step", "checkpoint"), (1, 2, 3))[0]
        target = last_step(self.run) + self.moments.randint(1, STRIDE)
        deadline = time.monotonic() + PATIENCE
        left = self.writing()
        processes = self.start(self.run)
        try:
            if place == "start":
                time.sleep(self.moments.uniform(0, startup))
            else:
                while last_step(self.run) < target or (place == "checkpoint" and not self.writing() - left):
                    if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
                        codes = [process.poll() for process in processes]
                        raise Lost(f"no step {target} (exit codes {codes}); see {self.log}")
                    time.sleep(0.0005)
                time.sleep(self.moments.uniform(0, 0.03))
        finally:
            stop(processes)
        return "checkpoint" if self.writing() - left else "start" if place == "start" else "step"

    def kill_while_writing(self) -> int:
        """Kill short runs while they write their weights; how many had not yet, when they died."""
        reference = self.run.with_name(f"short-{self.processes}")
        self.finish(reference, steps=2)
        expected = (reference / "model.safetensors").read_bytes()
        early = 0
        for number in range(MODEL_KILLS):
            run = self.run.with_name(f"short-{self.processes}-{number}")
            processes = self.start(run, steps=2)
            try:
                deadline = time.monotonic() + PATIENCE
                while not any(run.glob(".model.safetensors.*")) and not (run / "model.safetensors").exists():
                    if time.monotonic() > deadline or any(process.poll() for process in processes):
                        raise Lost(f"{run} wrote no weights; see {self.log}")
                time.sleep(self.moments.choice((0, 0, 0.0005, 0.002)))
            finally:
                stop(processes)
            if not (run / "model.safetensors").exists():
                early += 1
            elif (run / "model.safetensors").read_bytes() != expected:
                raise Lost(f"{run}/model.safetensors is half written, or another")
            self.resume(run)
            if (run / "model.safetensors").read_bytes() != expected:
                raise Lost(f"{run}/model.safetensors is not that of a run that nobody touched")
        return early

    def resume(self, run: Path) -> None:
        """Finish a short run, of which nothing but the weights may be left to write."""
        processes = self.start(run, steps=2)
        try:
            codes = [process.wait(PATIENCE) for process in processes]
        finally:
            stop(processes)
        if any(codes):
            raise Lost(f"exit codes {codes}; see {self.log}")

    def two_at_once(self) -> None:
        """A second run in the directory of one that goes on is refused, and harms nothing."""
        run = self.run.with_name("contested")
        processes = self.start(run)
        try:
            while last_step(run) == 0 and processes[0].poll() is None:
                time.sleep(0.001)
            processes[0].send_signal(signal.SIGSTOP)  # or it might be through before the other begins
            processes += self.start(run)
            second = processes[1].wait(PATIENCE)
            processes[0].send_signal(signal.SIGCONT)
            first = processes[0].wait(PATIENCE)
        finally:
            stop(processes)
        if (first, second) != (0, 2) or b"another process is at work there" not in self.log.read_bytes():
            raise Lost(f"of two runs in one directory the exit codes are {first} and {second}, not 0 and 2; {self.log}")
        if not same(weights(run), weights(self.through)):
            raise Lost("the weights of a contested run are not those of one alone")

    def writing(self) -> set[tuple[str, int]]:
        """Checkpoints that are being written, or were when a life ended."""
        found = set()
        for path in (self.run / "checkpoints").glob(".writing-*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
        return found

    def carry_out(self) -> dict[str, int]:
        """All of it; how many lives ended where."""
        startup = self.finish(self.through)
        places = {"start": 0, "step": 0, "checkpoint": 0}
        safe = 0
        for number in range(self.kills):
            place = self.kill_once(startup)
            places[place] += 1
            newest = newest_whole(self.run, print)
            step = int(newest.name.removeprefix("step-")) if newest is not None else 0
            if step < safe:
                raise Lost(f"kill {number + 1}: the newest checkpoint is of step {step}, after one of step {safe}")
            safe = step
            print(f"  kill {number + 1:2d}: {place:10s}  {last_step(self.run)} steps logged, {safe} safe", flush=True)
        self.finish(self.run)
        if not same(weights(self.run), weights(self.through)):
            raise Lost("the weights are not those of the uninterrupted run")
        if numbers(self.run) != numbers(self.through):
            raise Lost("the log is not that of the uninterrupted run")
        if steps_saved(self.run) != steps_saved(self.through):
            raise Lost("the checkpoints are not those of the uninterrupted run")
        early = self.kill_while_writing()
        print(f"  {MODEL_KILLS} kills while the weights were written, {early} before they were there", flush=True)
        if self.processes == 1:
            self.two_at_once()
            print("  of two runs at once one was refused", flush=True)
        return places


def last_step(run: Path) -> int:
    """How many steps the log holds."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.wait()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of each run (default: 1 2)")
    parser.add_argument("--cases", type=int, default=20_000, help="of damaged files (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the moments and the damage (default: another each time)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="varpi-soak-"))
    (folder / "pair").mkdir()
    tiny.make(folder / "pair")
    for processes in options.processes:
        soak = Soak(folder, options.kills, processes, random.Random(seed))
        print(f"{processes} process(es), {soak.steps} steps, {options.kills} kills, seed {seed}", flush=True)
        begun = time.monotonic()
        try:
            places = soak.carry_out()
        except (Lost, VarpiError, subprocess.TimeoutExpired) as error:
            print(f"LOST with {processes} process(es), seed {seed}: {error}\neverything is in {folder}")
            return 1
        ended = ", ".join(f"{count} in {place}" for place, count in places.items())
        print(f"  {options.kills} kills ({ended}); weights and log bit-identical; {time.monotonic() - begun:.0f} s")
    shutil.rmtree(folder)
    if options.cases:
        fuzz = Path(__file__).with_name("fuzz.py")
        return subprocess.run([sys.executable, fuzz, "--cases", str(options.cases), "--seed", str(seed)]).returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
