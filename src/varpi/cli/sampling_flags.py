"""The flags of sampling: one for each field of `Sampling`, from which they take names, types, defaults and help."""

import argparse
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from varpi.sampling.settings import Sampling


def add_flags(parser: Any) -> None:
    """`--guidance-scale`, `--top-k`, …; without `--seed` the seed is 0, so that a command can be repeated."""
    hints = get_type_hints(Sampling, include_extras=True)
    for setting in fields(Sampling):
        flag, (kind, help) = "--" + setting.name.replace("_", "-"), get_args(hints[setting.name])
        shown = f"{help} (default: %(default)s)"
        if setting.name == "seed":
            parser.add_argument(flag, type=int, default=0, help=shown)
        elif kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), default=setting.default, help=shown)
        else:
            parser.add_argument(flag, type=kind, default=setting.default, help=shown)


def settings_of(options: argparse.Namespace) -> Sampling:
    """The settings that parsed flags give. Raises VarpiError for values out of range."""
    return Sampling(**{setting.name: getattr(options, setting.name) for setting in fields(Sampling)})
