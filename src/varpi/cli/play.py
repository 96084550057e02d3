"""`varpi play`: a page to try a pair on."""

import argparse
import signal
from pathlib import Path
from typing import Any, NoReturn

from varpi.cli.options import add_class_names, add_pair, asked_pair, command, say
from varpi.errors import Stopped, VarpiError


def add(commands: Any) -> None:
    parser = command(
        commands,
        "play",
        run,
        "try a pair in the browser",
        "Serve a page on which a pair draws images row by row, a run beside what it started from; takes VA-π's step\n"
        "on a picture of yours; and shows what studies found. Without GENERATOR it is the embedded digits that play.\n"
        "Needs the extra `play`. For instance\n"
        "  varpi play runs/digits                  # beside the pair that it started from\n"
        "  varpi play runs/xxl --compare c2i_XXL_384.pt --architecture llamagen-c2i-xxl --image-size 384",
    )
    add_pair(parser, default="digits")
    against = parser.add_mutually_exclusive_group()
    against.add_argument("--compare", metavar="BASE", help="another generator (default: what a run started from)")
    against.add_argument("--alone", action="store_true", help="nothing beside a run, which takes half the memory")
    add_class_names(parser)
    parser.add_argument("--perceptual-weights", metavar="FILE", help="of the reward's LPIPS trunk")
    parser.add_argument(
        "--studies",
        nargs="+",
        default=["runs"],
        metavar="PATH",
        help="study.json files, or directories at most two folders above some (default: runs)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets everyone in who can reach this machine (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    if not 0 <= options.port < 2**16:
        raise VarpiError(f"--port is {options.port}; it must be in [0, 65535]")
    from varpi.data.classes import read_classes
    from varpi.play.opened import open_playground
    from varpi.play.server import address, check_extra, listen, open_server
    from varpi.runtime.processes import choose_device

    def open_named(source: str, tokenizer: Any) -> Any:
        named = {"generator": source, "tokenizer": options.tokenizer or tokenizer}
        return asked_pair(argparse.Namespace(**{**vars(options), **named, "dtype": "float32"}))

    check_extra()
    signal.signal(signal.SIGTERM, _stop)  # else it would end before what visitors left is cleared away
    with listen(options.host, options.port) as listening:
        playground = open_playground(
            options.generator,
            open_named,
            compare=options.compare,
            alone=options.alone,
            class_names=None if options.class_names is None else read_classes(options.class_names),
            perceptual_weights=options.perceptual_weights,
            device=choose_device(options.device),
        )
        with open_server(playground, [Path(place) for place in options.studies], listening) as server:
            say(f"{address(listening)} (Ctrl-C stops)")
            server.run(sockets=[listening])
            raise KeyboardInterrupt  # nothing else ends it; asyncio may keep the interrupt to itself


def _stop(number: int, _: Any) -> NoReturn:
    raise Stopped(number, "stopped")
