"""`varpi completion`: a script that completes varpi's commands and options in a shell."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from varpi.cli.options import command
from varpi.errors import VarpiError
from varpi.recipes import shipped_recipes

_FILES = ("run_directory", "checkpoint", "generator", "samples", "output", "tokenizer", "json", "reference", "weights")
"""Arguments that are completed with the names of files."""


def add(commands: Any) -> None:
    parser = command(
        commands,
        "completion",
        run,
        "print a script that completes commands in a shell",
        "Print the script for a shell, for instance\n"
        "  varpi completion bash > ~/.local/share/bash-completion/completions/varpi\n"
        "  varpi completion zsh > /usr/local/share/zsh/site-functions/_varpi\n"
        "It needs: pip install 'varpi[completion]'",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise VarpiError("varpi completion needs: pip install 'varpi[completion]'") from error
    for action in (action for parser in _commands(options.parser) for action in parser._actions):
        if action.dest == "recipe":
            action.choices = shipped_recipes()  # for the script alone: this parser parses nothing more
        elif action.dest in _FILES:
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    sys.stdout.write(shtab.complete(options.parser, shell=options.shell))


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands, and of theirs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _commands(below)
