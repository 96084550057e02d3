"""What several commands share: devices, and the pair of a generator and its tokenizer."""

import argparse
import sys
from pathlib import Path
from typing import Any

from varpi.errors import VarpiError, printable


def command(commands: Any, name: str, run: Any, short: str, long: str) -> argparse.ArgumentParser:
    """The parser of one command, among `commands`. run: what carries it out; None when it has kinds of its own."""
    parser = commands.add_parser(
        name, help=short, description=long, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def say(message: str) -> None:
    """Print a result, on a line."""
    print(printable(message))


def warn(message: str) -> None:
    """Print to stderr what is no result, on a line."""
    print(printable(message), file=sys.stderr)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")


def add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "generator", metavar="GENERATOR", help="checkpoint, run directory, Hub id, or `digits` for the embedded one"
    )
    parser.add_argument(
        "--tokenizer", help="checkpoint, Hub id, or `digits` (default: the run's; a transformers model brings its own)"
    )
    parser.add_argument("--architecture", help="of a foreign generator, for instance llamagen-c2i-xxl")
    parser.add_argument("--tokenizer-architecture", help="of a foreign tokenizer: vq-16 or vq-8")
    parser.add_argument("--image-size", type=int, help="pixels per side; needed for LlamaGen's own files")
    parser.add_argument(
        "--text-encoder", help="T5 directory or Hub id, for LlamaGen with captions (default: the run's, if it has one)"
    )
    add_device(parser)


def load_pair(options: argparse.Namespace) -> tuple[Any, Any]:
    from varpi.generators.pretrained import PretrainedGenerator
    from varpi.runtime.processes import choose_device
    from varpi.weights import check_pair, load_generator, load_tokenizer
    from varpi.weights.pair import give_text_encoder

    device = choose_device(options.device)
    recipe = recipe_of(options.generator)
    generator: Any = load_generator(
        options.generator, architecture=options.architecture, image_size=options.image_size, device=device
    )
    source, architecture = options.tokenizer, options.tokenizer_architecture
    brings_its_own = isinstance(generator, PretrainedGenerator)
    if source is None and brings_its_own:
        source, architecture = options.generator, options.architecture
    elif source is None and recipe is not None and recipe.tokenizer is not None:
        source = recipe.tokenizer.source
        named = recipe.tokenizer.architecture
        architecture = named if isinstance(named, str) else None
    if source is None:
        raise VarpiError("--tokenizer is missing: a checkpoint, a Hub id, or `digits`")
    tokenizer = load_tokenizer(source, architecture=architecture, device=device)
    check_pair(generator, tokenizer)
    side = generator.grid * tokenizer.downsample
    if options.image_size not in (None, side):
        raise VarpiError(f"--image-size {options.image_size}: this pair makes images of {side} pixels")
    encoder = options.text_encoder
    if encoder is None and recipe is not None and recipe.generator is not None:
        encoder = recipe.generator.text_encoder
    if encoder is not None:
        give_text_encoder(generator, encoder, device)
    return generator, tokenizer


def recipe_of(source: str) -> Any:
    """The recipe of a run directory; None for anything else."""
    from varpi.recipe import parse_recipe, read_yaml

    path = Path(source, "recipe.yaml")
    return parse_recipe(read_yaml(path), str(path)) if path.is_file() else None


def digest(source: str) -> str | None:
    """The sha256 of a generator's weights, of a file or of a run's; None where there is no one file."""
    from varpi.weights import sha256_of

    path = Path(source, "model.safetensors") if Path(source).is_dir() else Path(source)
    return sha256_of(path) if path.is_file() else None
