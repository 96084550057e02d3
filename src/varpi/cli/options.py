"""What several commands share: devices, and the pair of a generator and its tokenizer."""

import argparse
import sys
from pathlib import Path
from typing import Any

from varpi.errors import printable


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


def add_class_names(parser: Any) -> None:
    """What the data's class ids mean, where neither the data nor a generator says it."""
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="the names of all classes in the order of their ids, a name a line, or `imagenet`, as data.classes",
    )


def add_card(parser: Any) -> None:
    """What a model card says that no file of a run tells."""
    parser.add_argument(
        "--license", metavar="ID", help="as the Hub spells it: mit, apache-2.0, other (default: of embedded weights)"
    )
    parser.add_argument("--license-link", metavar="URL", help="of the licence `other`")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of what the run began with (default: the recipe's)")
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="FILE",
        help="of `varpi evaluate --json`, beside those of these weights that lie in RUN",
    )


def asked_card(options: argparse.Namespace) -> dict[str, Any]:
    """These options as `export_with_card` takes them."""
    return {
        "base_model": options.base_model,
        "licence": options.license,
        "licence_link": options.license_link,
        "results": [Path(path) for path in options.results],
    }


def add_pair(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """The generator and what belongs to it. default: the generator where none is named."""
    parser.add_argument(
        "generator",
        metavar="GENERATOR",
        nargs=None if default is None else "?",
        default=default,
        help="checkpoint, run directory, Hub id, or an embedded pair: digits, cifar10, shapes",
    )
    parser.add_argument(
        "--tokenizer",
        help="checkpoint, Hub id, or of an embedded pair (default: the run's; a transformers model brings its own)",
    )
    parser.add_argument(
        "--architecture",
        help="of a foreign generator: a name such as llamagen-c2i-xxl, or a .json file of LlamaGenConfig's fields",
    )
    parser.add_argument("--tokenizer-architecture", help="of a foreign tokenizer: vq-16, vq-8, or a .json file")
    parser.add_argument("--image-size", type=int, help="pixels per side; needed for LlamaGen's own files")
    parser.add_argument(
        "--text-encoder", help="T5 directory or Hub id, for LlamaGen with captions (default: the run's, if it has one)"
    )
    add_device(parser)


def asked_pair(options: argparse.Namespace) -> Any:
    """The `Pair` that the options name."""
    from varpi.recipe import read_architecture
    from varpi.runtime.processes import choose_device
    from varpi.weights.pair import open_pair

    return open_pair(
        options.generator,
        tokenizer=options.tokenizer,
        architecture=read_architecture(options.architecture),
        tokenizer_architecture=read_architecture(options.tokenizer_architecture),
        image_size=options.image_size,
        text_encoder=options.text_encoder,
        device=choose_device(options.device),
        dtype=options.dtype,
    )


def digest(source: str) -> str | None:
    """The sha256 of a generator's weights, of a file or of a run's; None where there is no one file."""
    from varpi.weights import sha256_of

    path = Path(source).expanduser()
    path = path / "model.safetensors" if path.is_dir() else path
    return sha256_of(path) if path.is_file() else None
