"""`varpi demo`: the whole job on the embedded digits."""

import argparse
from pathlib import Path
from typing import Any

from varpi.cli.options import command, say


def add(commands: Any) -> None:
    parser = command(
        commands,
        "demo",
        run,
        "the whole job on the embedded digits, in minutes on a CPU",
        "Evaluate the embedded generator, post-train it with VA-π, with its best setting and, as a control, with\n"
        "cross-entropy alone, evaluate again, and write report.html and metrics.json. Needs no network.",
    )
    parser.add_argument("--output", default="runs/demo", help="directory for the results (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="training steps (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="images per evaluation (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="sampling seeds per evaluation (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    from varpi.studies.demo import demo

    page = demo(Path(options.output), steps=options.steps, samples=options.samples, seeds=options.seeds)
    say(f"wrote {page} and {page.with_name('metrics.json')}")
