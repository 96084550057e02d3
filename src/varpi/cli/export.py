"""`varpi export`: a checkpoint under the names of the original code, or a run as a directory with a model card."""

import argparse
from pathlib import Path
from typing import Any

from varpi.cli.options import add_card, asked_card, command, say
from varpi.errors import VarpiError


def add(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        run,
        "write a checkpoint that the original code loads",
        "Write a generator or tokenizer under the names of LlamaGen's released files: a plain dictionary of tensors\n"
        "(torch.save), or safetensors when the output's name ends so. A transformers model (Janus) becomes a\n"
        "directory for from_pretrained. Adapters (LoRA) are merged.\n"
        "With --card, of a run: a directory with its weights in each form, its recipe (with the paths in it) and a\n"
        "model card, as `varpi push` uploads it, for instance\n"
        "  varpi export runs/xxl --card --license mit --base-model FoundationVision/LlamaGen --output xxl",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory, file, or of an embedded pair")
    parser.add_argument("--output", required=True, help="the file (.pt, .pth, .safetensors) or directory to write")
    parser.add_argument("--tokenizer", action="store_true", help="the checkpoint is a tokenizer")
    card = parser.add_argument_group("model card")
    card.add_argument("--card", action="store_true", help="write a directory with a model card, README.md")
    add_card(card)


def run(options: argparse.Namespace) -> None:
    from varpi.runtime.files import check_output
    from varpi.weights import export_original, load_generator, load_tokenizer

    check_output("--output", options.output)
    if options.card:
        from varpi.report.card import export_with_card

        if options.tokenizer:
            raise VarpiError("--tokenizer is for checkpoints; with --card the run's recipe tells what it trained")
        export_with_card(
            Path(options.checkpoint), Path(options.output), name=Path(options.output).name, **asked_card(options)
        )
    else:
        for flag in ("license", "license_link", "base_model", "results"):
            if getattr(options, flag):
                raise VarpiError(f"--{flag.replace('_', '-')} is for the model card: add --card")
        model = load_tokenizer(options.checkpoint) if options.tokenizer else load_generator(options.checkpoint)
        export_original(model, options.output)
    say(f"wrote {options.output}")
