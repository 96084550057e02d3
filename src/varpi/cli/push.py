"""`varpi push`: a run, with a model card, to the Hugging Face Hub."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from varpi.cli.options import add_card, asked_card, command, say


def add(commands: Any) -> None:
    parser = command(
        commands,
        "push",
        run,
        "upload a run with a model card to the Hub",
        "Upload what `varpi export --card` writes to a repository of the Hugging Face Hub, which is made where there\n"
        "is none: weights, recipe (with the paths in it) and card. Log in first: hf auth login. For instance\n"
        "  varpi push runs/xxl me/llamagen-xxl-va-pi --license mit --base-model FoundationVision/LlamaGen",
    )
    parser.add_argument("run_directory", metavar="RUN", help="directory of a training run")
    parser.add_argument("repository", metavar="REPO", help="name on the Hub, as in me/llamagen-xxl-va-pi")
    parser.add_argument("--private", action="store_true", help="a repository that is made is private")
    add_card(parser)


def run(options: argparse.Namespace) -> None:
    from varpi.report.card import export_with_card
    from varpi.runtime.hub import check_repository, upload

    check_repository(options.repository)
    source = Path(options.run_directory)
    with tempfile.TemporaryDirectory(prefix=".push-", dir=source if source.is_dir() else None) as folder:
        made = Path(folder, "repository")
        export_with_card(source, made, name=options.repository, **asked_card(options))
        say(f"uploaded to {upload(made, options.repository, private=options.private)}")
