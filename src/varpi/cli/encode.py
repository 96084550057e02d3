"""`varpi encode`: images into tokens, captions into features, once for many runs."""

import argparse
import sys
from pathlib import Path
from typing import Any

from varpi.cli.options import add_class_names, add_device, command, digest, say
from varpi.errors import VarpiError

T5 = "google/flan-t5-xl"
"""LlamaGen's text encoder."""


def add(commands: Any) -> None:
    group = command(
        commands,
        "encode",
        None,
        "turn images into tokens, or captions into features",
        "Do once what training would do again and again: `varpi encode images` and `varpi encode captions`.",
    )
    kinds = group.add_subparsers(dest="kind", required=True, metavar="KIND")
    parser = command(
        kinds,
        "images",
        _encode_images,
        "images into tokens",
        "Encode every image of a data source. Writes a safetensors file: tokens int32 (images, N), indices int64, and\n"
        "classes int64 where the source has them. Interrupted, the same command goes on where it was; under torchrun\n"
        "the processes share the images, and the file is the same.",
    )
    parser.add_argument(
        "data", metavar="DATA", help="folder of class folders, HF dataset, parquet, Hub id, or `digits`"
    )
    parser.add_argument(
        "--tokenizer", required=True, help="checkpoint, Hub id, or of an embedded pair: digits, cifar10, shapes"
    )
    parser.add_argument("--tokenizer-architecture", help="of a foreign tokenizer: vq-16, vq-8, or a .json file")
    parser.add_argument("--image-size", type=int, required=True, help="pixels per side")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    add_class_names(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    add_device(parser)
    parser.add_argument("--output", required=True, help="the safetensors file to write")

    parser = command(
        kinds,
        "captions",
        _encode_captions,
        "captions into T5 features",
        "Encode every caption of a data source for LlamaGen, a file each, in its own layout: OUTPUT/SHARD/SAMPLE.npy\n"
        "for tar shards, OUTPUT/FILE/LINE.npy for jsonl files, OUTPUT/rows/ROW.npy for tables. Train with them by\n"
        "--set data.caption_features=OUTPUT; features of a split that validates belong into OUTPUT/SPLIT.\n"
        "Files that are there already are kept, so an interrupted run goes on; under torchrun every process encodes\n"
        "its share.",
    )
    parser.add_argument("data", metavar="DATA", help="tar shards, jsonl files, HF dataset, parquet, or Hub id")
    parser.add_argument("--text-encoder", default=T5, help="T5 directory or Hub id (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=120, help="a caption's longest (default: %(default)s)")
    parser.add_argument(
        "--caption-column", action="append", metavar="NAME", help="in order of preference; may be repeated"
    )
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument(
        "--format",
        choices=("npy", "safetensors"),
        default="npy",
        help="npy is LlamaGen's, float32; safetensors is bfloat16, half as large (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="captions at once (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--output", required=True, help="the folder of the features")


def _encode_images(options: argparse.Namespace) -> None:
    from varpi.data import open_dataset
    from varpi.data.image_tokens import encode_images
    from varpi.recipe import read_architecture
    from varpi.runtime.processes import find_world
    from varpi.weights import load_tokenizer

    if options.batch_size < 1:
        raise VarpiError(f"--batch-size is {options.batch_size}; it must be at least 1")
    if not 1 <= options.image_size <= 2**14:
        raise VarpiError(f"--image-size is {options.image_size}; it must be from 1 to {2**14}")
    world, output = find_world(options.device), Path(options.output)
    dataset = open_dataset(
        options.data, image_size=options.image_size, split=options.split, classes=options.class_names
    )
    tokenizer = load_tokenizer(
        options.tokenizer, architecture=read_architecture(options.tokenizer_architecture), device=world.device
    )
    count, made = encode_images(
        dataset,
        tokenizer,
        output,
        about={
            "data": options.data,
            "split": options.split,
            "tokenizer": options.tokenizer,
            "tokenizer_sha256": digest(options.tokenizer),
        },
        image_size=options.image_size,
        batch_size=options.batch_size,
        world=world,
        progress=world.is_main and sys.stderr.isatty(),
    )
    if world.is_main and made:
        say(f"wrote the tokens of {count} of {len(dataset)} images to {output}")
    elif world.is_main:
        say(f"{output} holds the tokens of {count} of {len(dataset)} images already")


def _encode_captions(options: argparse.Namespace) -> None:
    from varpi.data import open_dataset
    from varpi.data.caption_features import encode_captions
    from varpi.data.left_out import LeftOut
    from varpi.data.text_encoder import TextEncoder
    from varpi.runtime.processes import find_world

    world, left_out = find_world(options.device), LeftOut()
    # Of any size: an image of one pixel would do
    dataset: Any = open_dataset(options.data, image_size=1, split=options.split, caption_column=options.caption_column)
    if dataset.num_classes is not None:
        raise VarpiError(f"{options.data}: it has classes, not captions; try --caption-column")
    counts = encode_captions(
        dataset,
        TextEncoder(options.text_encoder, max_tokens=options.max_tokens, device=world.device),
        Path(options.output),
        form=options.format,
        batch_size=options.batch_size,
        about={"split": options.split, "caption_column": options.caption_column},
        rank=world.rank,
        world_size=world.size,
        left_out=left_out,
        progress=world.is_main and sys.stderr.isatty(),
    )
    share = f"process {world.rank} of {world.size}: " if world.size > 1 else ""
    left_out.say(f"{share}{options.data}", len(dataset), "captions")
    say(f"{share}wrote the features of {counts.written} captions to {options.output}; {counts.kept} were there already")
