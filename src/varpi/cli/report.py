"""`varpi report`: the page of a run, or of a comparison."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from varpi.cli.options import add_device, command, say
from varpi.errors import VarpiError

PAGE = b'<meta name="generator" content="varpi">'
"""What every page of this command holds, and what it replaces must."""


def add(commands: Any) -> None:
    parser = command(
        commands,
        "report",
        run,
        "write the page of a run, or of a comparison",
        "Of a run: RUN/report.html with learning curves, samples before and after from the same seeds, settings,\n"
        "cost.\n"
        "Of results that `varpi evaluate --json` wrote: a comparison, for instance\n"
        "  varpi report --compare base=base.json tuned=tuned.json --output page.html\n"
        "with tables (several results of one name are sampling seeds), the same samples side by side, changes by\n"
        "class, worst and best samples, and with --embeddings the density and a map of image features.",
    )
    parser.add_argument("run_directory", metavar="RUN", nargs="?", help="directory of a training run")
    parser.add_argument(
        "--samples", type=int, default=4, help="images per class or caption, 0 for none (default: %(default)s)"
    )
    parser.add_argument("--compare", nargs="+", metavar="NAME=RESULT", help="result files; the base first")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME=RUN", help="runs, for curves and costs")
    parser.add_argument("--embeddings", metavar="FEATURES", help="as --features of `varpi evaluate`")
    parser.add_argument("--weights", metavar="FILE", help="of that network")
    parser.add_argument("--output", help="the page to write, of a comparison")
    add_device(parser)


def run(options: argparse.Namespace) -> None:
    from varpi.runtime.files import check_output
    from varpi.runtime.processes import choose_device

    device = choose_device(options.device)
    if (options.run_directory is None) == (options.compare is None):
        raise VarpiError("give either a RUN or results to --compare")
    if options.run_directory is not None:
        from varpi.report.run import report_run

        if options.output is not None:
            raise VarpiError("--output is for --compare; the page of a RUN is RUN/report.html")
        check_output("the page", Path(options.run_directory, "report.html"), marker=PAGE)

        page = report_run(Path(options.run_directory), per_condition=options.samples, device=device)
    else:
        from varpi.networks.loading import load_extractor
        from varpi.report.comparison import read_named, report_comparison

        if options.output is None:
            raise VarpiError("--output is missing: the page to write")
        check_output("--output", options.output, marker=PAGE)
        extractor = None
        if options.embeddings:
            extractor = load_extractor(options.embeddings, weights=options.weights, device=device)
        page = report_comparison(
            Path(options.output),
            read_named(options.compare),
            runs={name: paths[0] for name, paths in read_named(options.runs).items()},
            extractor=extractor,
            command="varpi " + shlex.join(sys.argv[1:]),
        )
    say(f"wrote {page}")
