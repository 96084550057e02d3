"""`varpi sample`, and the options of sampling."""

import argparse
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from varpi.cli.options import add_pair, command, digest, load_pair, say
from varpi.cli.sampling_flags import add_flags, settings_of
from varpi.errors import VarpiError


def add(commands: Any) -> None:
    parser = command(
        commands,
        "sample",
        run,
        "generate images",
        "Generate images free-running, of classes or of prompts, as the generator is conditioned. Writes\n"
        "OUTPUT/00000.png …, grid.png, samples.npz (ADM's layout: arr_0) and sample.json with every setting;\n"
        "with --geneval also OUTPUT/geneval in GenEval's layout.",
    )
    add_pair(parser)
    parser.add_argument("--output", required=True, help="directory for the images; must not exist or be empty")
    add_sampling(parser, required=True)
    parser.add_argument("--batch-size", type=int, default=64, help="images in flight (default: %(default)s)")
    parser.add_argument(
        "--geneval", action="store_true", help="the file of --prompts is GenEval's metadata: write its folders too"
    )


def run(options: argparse.Namespace) -> None:
    output = _fresh_directory(options.output)
    count = write_samples(options, output)
    say(f"wrote {count} images to {output}")


def add_sampling(parser: Any, *, required: bool) -> None:
    """What to generate, and how."""
    which = parser.add_mutually_exclusive_group(required=required)
    which.add_argument("--classes", help="class ids, separated by commas: one image each")
    which.add_argument("--per-class", type=int, metavar="N", help="N images of every class")
    which.add_argument("--count", type=int, metavar="N", help="N images of classes drawn at random")
    which.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    which.add_argument("--prompts", metavar="FILE", help="lines, .jsonl, DrawBench's .json, PartiPrompts' .tsv")
    which.add_argument("--captions", metavar="DATA", help="the captions of a data source, such as `captioned-digits`")
    parser.add_argument("--per-prompt", type=int, default=1, metavar="N", help="images of each (default: %(default)s)")
    parser.add_argument("--caption-split", default="test", help="of --captions (default: %(default)s)")
    parser.add_argument("--caption-column", action="append", metavar="NAME", help="of --captions; may be repeated")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts or captions")
    add_flags(parser)
    parser.add_argument(
        "--resize", type=int, metavar="S", help="resize from 384 to 256 as the paper does; S must be 256"
    )


def write_samples(options: argparse.Namespace, output: Path) -> int:
    """Generate what the options ask for into `output`."""
    from varpi.samples.writing import write_samples

    prompts = _prompts(options)
    generator, tokenizer = load_pair(options)
    condition: Any = _classes(options, generator.num_classes) if prompts is None else prompts
    record = {"generator": options.generator, "generator_sha256": digest(options.generator)}
    count = write_samples(
        output,
        generator,
        tokenizer,
        condition,
        sampling=settings_of(options),
        record={**record, "tokenizer": options.tokenizer},
        resize=options.resize,
        batch_size=options.batch_size,
        progress=sys.stderr.isatty(),
    )
    if options.geneval:
        _write_geneval(options, output)
    return count


def _write_geneval(options: argparse.Namespace, output: Path) -> None:
    import numpy as np

    from varpi.data.images import decode
    from varpi.data.prompts import read_geneval_metadata
    from varpi.evaluation.geneval import write_geneval_folder

    if options.prompts is None:
        raise VarpiError("--geneval: give GenEval's metadata by --prompts")
    metadata = read_geneval_metadata(options.prompts)[: options.limit]
    files = [
        [output / f"{prompt * options.per_prompt + i:05d}.png" for i in range(options.per_prompt)]
        for prompt in range(len(metadata))
    ]
    images = (np.stack([np.asarray(decode(file, str(file))) for file in group]) for group in files)
    write_geneval_folder(output / "geneval", metadata, images)
    shutil.copyfile(output / "sample.json", output / "geneval" / "sample.json")


def _prompts(options: argparse.Namespace) -> list[str] | None:
    """What to write images of, each `per_prompt` times; None when classes are asked for."""
    from varpi.data import BadImage, Dropped, open_dataset
    from varpi.data.prompts import read_prompts

    if options.per_prompt < 1 or (options.limit is not None and options.limit < 1):
        raise VarpiError("--per-prompt and --limit must be at least 1")
    if options.prompt is not None:
        prompts = options.prompt
    elif options.prompts is not None:
        prompts = read_prompts(options.prompts)
    elif options.captions is not None:
        dataset: Any = open_dataset(
            options.captions, image_size=32, split=options.caption_split, caption_column=options.caption_column
        )
        if dataset.num_classes is not None:
            raise VarpiError(f"--captions {options.captions}: it has classes, not captions; try --caption-column")
        prompts = []
        for i in range(len(dataset)):
            if len(prompts) == options.limit:
                break
            with suppress(BadImage, Dropped):
                prompts.append(dataset.caption(i))
        if not prompts:
            raise VarpiError(f"--captions {options.captions}: none of its {len(dataset)} rows has a usable caption")
    else:
        return None
    return [prompt for prompt in prompts[: options.limit] for _ in range(options.per_prompt)]


def _classes(options: argparse.Namespace, num_classes: int | None) -> Any:
    import torch

    if num_classes is None:
        raise VarpiError("this generator is conditioned on text: give --prompt, --prompts or --captions")
    if options.classes is not None:
        try:
            return torch.tensor([int(part) for part in options.classes.split(",")])
        except ValueError as error:
            raise VarpiError(f"--classes {options.classes}: expected whole numbers separated by commas") from error
    count = options.per_class if options.per_class is not None else options.count
    if count < 1:
        raise VarpiError(f"the number of images is {count}; it must be at least 1")
    if options.per_class is not None:
        return torch.arange(num_classes).repeat(count)  # any run of neighbors is balanced, as for splits of scores
    return torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(options.seed))


def _fresh_directory(name: str) -> Path:
    path = Path(name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise VarpiError(f"{path} already holds something; choose another --output")
    return path
