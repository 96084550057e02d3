"""`varpi study`: variants of training and sampling, several seeds, one protocol, one page."""

import argparse
from pathlib import Path
from typing import Any

from varpi.cli.options import add_device, command, say
from varpi.errors import VarpiError
from varpi.studies import shipped_studies


def add(commands: Any) -> None:
    parser = command(
        commands,
        "study",
        run,
        "compare methods over several seeds, by one protocol, on one page",
        "Train the variants of STUDY, a YAML file or one that ships with varpi, with each of its seeds; choose\n"
        "learning rates, temperatures and guidance scales on a validation split; measure all alike on the test split.\n"
        "Writes study.html and study.json into --output. The same command goes on after an interruption, and several\n"
        "at once on one --output share the work. These ship with varpi:\n"
        f"  {', '.join(shipped_studies())}",
    )
    parser.add_argument("study", metavar="STUDY", help="a shipped study's name or a YAML file")
    parser.add_argument("--output", help="directory for all that is made (default: runs/study- and the study's name)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="change a value of the study, for instance --set protocol.samples=500 or, in all recipes, "
        "--set set.training.steps=20; may be repeated",
    )
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="some of the variants (default: all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="some of the training seeds (default: all)"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="jobs at once, one thread each (default: one a core, at most 8; with CUDA 1)",
    )
    parser.add_argument(
        "--records",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="go on from the records.jsonl of another machine's --output; weights that something still needs are "
        "trained again",
    )
    add_device(parser)
    parser.add_argument("--print-study", action="store_true", help="print the complete study and stop")


def run(options: argparse.Namespace) -> None:
    from varpi.studies.plan import load_study

    study, where = load_study(options.study, options.settings)
    if options.only:
        study = study.only(options.only)
    if options.print_study:
        print(study.to_yaml(), end="")
        return
    if options.jobs is not None and options.jobs < 1:
        raise VarpiError(f"--jobs is {options.jobs}; it must be at least 1")
    import torch

    from varpi.runtime.processes import choose_device
    from varpi.studies.jobs import AT_ONCE
    from varpi.studies.study import carry_out_study

    device = choose_device(options.device)
    page = carry_out_study(
        study,
        where,
        Path(options.output or Path("runs", f"study-{Path(options.study).stem}")),
        seeds=options.seeds,
        records=options.records,
        jobs=options.jobs or (min(torch.get_num_threads(), AT_ONCE) if device == "cpu" else 1),
        device=device,
        command=_command(options),
    )
    say(f"wrote {page} and {page.with_suffix('.json')}")


def _command(options: argparse.Namespace) -> str:
    """What was asked for, as a line that a shell takes, without what moves no number."""
    import shlex

    words = ["varpi", "study", options.study]
    for setting in options.settings:
        words += ["--set", setting]
    for flag in ("only", "seeds"):
        if values := getattr(options, flag):
            words += [f"--{flag}", *map(str, values)]
    return shlex.join(words)
