"""The command line: demo, train, sample, evaluate, encode, export, report, doctor.

Each command is a file beside this one: `add` describes it, `run` carries it out and imports what is heavy.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from varpi import __version__
from varpi.cli import demo, doctor, encode, evaluate, export, report, sample, train
from varpi.errors import VarpiError

COMMANDS = (demo, train, sample, evaluate, encode, export, report, doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it did what was asked, 2 for input that is refused."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        options.run(options)
    except VarpiError as error:
        print(f"varpi {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, or a place that may not be read or written
        where = f"{error.filename}: " if error.filename else ""
        print(f"varpi {options.command}: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"varpi {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="varpi",
        description="Post-train autoregressive image generators so that their tokens decode into real images.",
        epilog="`varpi COMMAND --help` explains one. Start with `varpi demo`; `varpi doctor` checks this machine.",
    )
    parser.add_argument("--version", action="version", version=f"varpi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
