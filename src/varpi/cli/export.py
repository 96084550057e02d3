"""`varpi export`: a checkpoint under the names of the original code."""

import argparse
from typing import Any

from varpi.cli.options import command, say


def add(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        run,
        "write a checkpoint that the original code loads",
        "Write a generator or tokenizer under the names of LlamaGen's released files: a plain dictionary of tensors\n"
        "(torch.save), or safetensors when the output's name ends so. A transformers model (Janus) becomes a\n"
        "directory for from_pretrained. Adapters (LoRA) are merged.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory, file, or `digits`")
    parser.add_argument("--output", required=True, help="the file (.pt, .pth, .safetensors) or directory to write")
    parser.add_argument("--tokenizer", action="store_true", help="the checkpoint is a tokenizer")


def run(options: argparse.Namespace) -> None:
    from varpi.runtime.files import check_output
    from varpi.weights import export_original, load_generator, load_tokenizer

    check_output("--output", options.output)
    model = load_tokenizer(options.checkpoint) if options.tokenizer else load_generator(options.checkpoint)
    export_original(model, options.output)
    say(f"wrote {options.output}")
