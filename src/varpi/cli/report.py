"""`varpi report`: the page of a run, or of a comparison."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from varpi.cli.options import add_device, command, say, warn
from varpi.cli.sample import class_ids
from varpi.cli.sampling_flags import add_flags, settings_of
from varpi.errors import VarpiError

PAGE = b'<meta name="generator" content="varpi">'
"""What every page of this command holds, and what it replaces must."""


def add(commands: Any) -> None:
    parser = command(
        commands,
        "report",
        run,
        "write the page of a run, or of a comparison",
        "Of a run: RUN/report.html with samples before and after from the same seeds, images seen through both\n"
        "models, learning curves, results of `varpi evaluate --json RUN/NAME.json`, settings, cost.\n"
        "Of results that `varpi evaluate --json` wrote: a comparison, for instance\n"
        "  varpi report --compare base=base.json tuned=tuned.json --output page.html\n"
        "with tables (several results of one name are sampling seeds), the same samples side by side, changes by\n"
        "class, worst and best samples, and with --embeddings the density and a map of image features.",
    )
    parser.add_argument("run_directory", metavar="RUN", nargs="?", help="directory of a training run")
    add_device(parser)
    group = parser.add_argument_group("of a run")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--classes", help="class ids to draw, separated by commas (default: ten, or eight of more)")
    which.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated (default: the data's captions)"
    )
    which.add_argument("--prompts", metavar="FILE", help="as `varpi sample` takes it")
    group.add_argument(
        "--samples", type=int, metavar="N", help="images of each, 0 for none (default: 4; beyond 64 pixels 1)"
    )
    group.add_argument(
        "--reconstructions", type=int, metavar="N", help="images seen through both (default: 8; beyond 64 pixels 2)"
    )
    add_flags(group)
    group = parser.add_argument_group("of a comparison")
    group.add_argument("--compare", nargs="+", metavar="NAME=RESULT", help="result files; the base first")
    group.add_argument("--runs", nargs="+", default=[], metavar="NAME=RUN", help="runs, for curves and costs")
    group.add_argument("--embeddings", metavar="FEATURES", help="as --features of `varpi evaluate`")
    group.add_argument("--weights", metavar="FILE", help="of that network")
    group.add_argument("--output", help="the page to write, of a comparison")


def run(options: argparse.Namespace) -> None:
    from varpi.runtime.files import check_output
    from varpi.runtime.processes import choose_device

    device = choose_device(options.device)
    if (options.run_directory is None) == (options.compare is None):
        raise VarpiError("give either a RUN or results to --compare")
    if options.run_directory is not None:
        from varpi.data.prompts import read_prompts
        from varpi.report.run import report_run

        if options.output is not None:
            raise VarpiError("--output is for --compare; the page of a RUN is RUN/report.html")
        check_output("the page", Path(options.run_directory, "report.html"), marker=PAGE)

        for flag, number in (("--samples", options.samples), ("--reconstructions", options.reconstructions)):
            if number is not None and number < 0:
                raise VarpiError(f"{flag} is {number}; it must be at least 0")
        page = report_run(
            Path(options.run_directory),
            device=device,
            sampling=settings_of(options),
            classes=class_ids(options.classes) if options.classes is not None else None,
            prompts=read_prompts(options.prompts) if options.prompts is not None else options.prompt,
            each=options.samples,
            reconstructed=options.reconstructions,
            command=shlex.join(["varpi", *sys.argv[1:]]),
            tell=warn,
        )
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
            command=shlex.join(["varpi", *sys.argv[1:]]),
        )
    say(f"wrote {page}")
