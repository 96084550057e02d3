"""The command line: `COMMANDS` are all of it.

Each command is a file beside this one: `add` describes it, `run` carries it out and imports what is heavy.
"""

import argparse
import logging
import os
import platform
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import NoReturn

from varpi import __version__
from varpi.cli import (
    completion,
    demo,
    doctor,
    encode,
    evaluate,
    export,
    play,
    push,
    recipes,
    report,
    sample,
    study,
    train,
)
from varpi.errors import Stopped, VarpiError, printable
from varpi.runtime.last_words import first_to_say, last_words

COMMANDS = (demo, recipes, train, sample, evaluate, study, play, encode, export, push, report, doctor, completion)
NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
LESS_MEMORY = {
    "train": "set training.micro_batch lower (and method.reward.decode_batch, if there is one) or, of a generator, "
    "training.gradient_checkpointing: true",
    "report": "set --samples lower",
    "demo": "set --samples lower",
    "study": "set --jobs or protocol.batch_size lower",
    "export": "use a machine with more memory, or close what else uses it",
    "push": "use a machine with more memory, or close what else uses it",
    "play": "set --alone, or use a machine with more memory",
    "doctor": "close what else uses it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns 0 when it did what was asked, 1 for a bug of varpi's own, 2 for what is refused or cannot be done here,
    and 128 plus the signal's number for a run that was stopped, as shells do: 130 for SIGINT, 143 for SIGTERM.
    Of the processes of torchrun one says what all would say.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = make_parser().parse_args(arguments)
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("%(levelname)s: %(message)s"))
    handler.addFilter(lambda record: first_to_say(record.getMessage()))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        options.run(options)
    except (Exception, KeyboardInterrupt) as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises again for a dead worker whenever a child ends
        code, lines = _explain(error, options.command)
        text = f"varpi {options.command}: " + "\n".join(map(printable, lines))
        with last_words(text) as ours:
            if ours:
                trace = f"; {printable(_write_trace(error, arguments))}" if code == 1 else ""
                print(text + trace, file=sys.stderr)
        return code
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="varpi",
        description="Post-train autoregressive image generators so that their tokens decode into real images.",
        epilog="`varpi COMMAND --help` explains one. Start with `varpi demo`; `varpi doctor` checks this machine.",
    )
    parser.add_argument("--version", action="version", version=f"varpi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    parser.set_defaults(parser=parser)  # `completion` describes it
    return parser


class _Parser(argparse.ArgumentParser):
    """And so are those of the commands, whose type follows it."""

    def error(self, message: str) -> NoReturn:
        with last_words(message) as ours:
            if ours:
                super().error(message)
        raise SystemExit(2)


def _explain(error: BaseException, command: str) -> tuple[int, Sequence[object]]:
    """The exit code and the lines to print."""
    match error:
        case VarpiError():
            return 2, error.args
        case Stopped():
            return 128 + error.signal, [error]
        case KeyboardInterrupt():
            return 130, ["interrupted"]
        case MemoryError() | OSError() | RuntimeError() if _lacks_memory(error):
            advice = LESS_MEMORY.get(command, "set --batch-size lower")
            return 2, [f"out of memory; {advice} ({_short(error)})"]
        case OSError():  # a full disk, or a place that may not be read or written
            where = f"{error.filename}: " if error.filename else ""
            return 2, [f"{where}{error.strerror or error}"]
    return 1, [f"a bug in varpi ({_short(error)})"]


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY)


def _short(error: BaseException) -> str:
    """The error's type and the beginning of its message, on one line."""
    text = " ".join(str(error)[:1000].split())
    return f"{type(error).__name__}: {text[:160]}{'…' if len(text) > 160 else ''}".removesuffix(": ")


def _write_trace(error: BaseException, arguments: Sequence[str]) -> str:
    """Put the whole trace where it can be attached to a report; says where."""
    about = f"varpi {__version__}, python {platform.python_version()} on {platform.platform()}"
    trace = "".join(traceback.format_exception(error))
    try:
        descriptor, name = tempfile.mkstemp(prefix="varpi-bug-", suffix=".txt")
        with os.fdopen(descriptor, "w", errors="backslashreplace") as file:
            file.write(f"varpi {shlex.join(arguments)}\n{about}\n\n{trace}")
    except OSError:
        sys.stderr.write(trace)
        return "the trace is above; please report it"
    return f"please report it with the trace in {name}"


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
