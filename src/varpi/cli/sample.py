"""`varpi sample`, and the options of sampling."""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varpi.cli.options import add_pair, asked_pair, command, digest, say
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
        "with --geneval also OUTPUT/geneval in GenEval's layout. Interrupted, the same command goes on where it was.\n"
        "Processes share the images, which are the same for any number of them:\n"
        "  torchrun --nproc-per-node 8 -m varpi sample runs/xxl --per-class 50 --output samples",
    )
    add_pair(parser)
    parser.add_argument("--output", required=True, help="directory for the images: new, or with these very samples")
    add_sampling(parser, required=True)
    parser.add_argument("--batch-size", type=int, default=64, help="images in flight (default: %(default)s)")
    parser.add_argument(
        "--geneval",
        action="store_true",
        help="the file of --prompts is GenEval's metadata, or --captions is `shapes`: write its folders too",
    )


def run(options: argparse.Namespace) -> None:
    from varpi.runtime.processes import find_world

    world, output = find_world(options.device), Path(options.output)
    wanted = prepare(options, output)
    made = wanted.make(output, world)
    if world.is_main:
        say(f"wrote {wanted.count} images to {output}" if made else f"{output} holds all {wanted.count} images already")


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
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the generator and the tokenizer; in bfloat16 they are faster and draw other tokens (%(default)s)",
    )
    parser.add_argument("--graph", action="store_true", help="replay a decode step as a CUDA graph, on one GPU")
    parser.add_argument(
        "--resize", type=int, metavar="S", help="resize from 384 to 256 as the paper does; S must be 256"
    )


@dataclass(frozen=True)
class Wanted:
    """Samples to make: everything is loaded and checked, nothing is made."""

    generator: Any
    tokenizer: Any
    condition: Any
    side: int
    sampling: Any
    record: Mapping[str, Any]
    resize: int | None
    batch_size: int
    graph: bool
    geneval: Sequence[Mapping[str, Any]] | None
    """GenEval's metadata where its layout is wanted, a record for each prompt."""

    @property
    def count(self) -> int:
        return len(self.condition)

    @property
    def asked(self) -> dict[str, Any]:
        """What each image is to show, as sample.json says it."""
        from varpi.samples.writing import asked_for

        return asked_for(self.condition)

    def make(self, output: Path, world: Any, *, together: bool = False) -> bool:
        """Make this process's share in `output`; False when all was there. The main process waits for all.

        together: the others too.
        """
        from varpi.samples.writing import write_samples

        made = write_samples(
            output,
            self.generator,
            self.tokenizer,
            self.condition,
            sampling=self.sampling,
            record=self.record,
            resize=self.resize,
            batch_size=self.batch_size,
            graph=self.graph,
            world=world,
            together=together,
            progress=world.is_main and sys.stderr.isatty(),
        )
        if self.geneval is not None and world.is_main and not (output / "geneval").exists():
            _write_geneval(output, self.geneval, self.count)
        return made


def prepare(options: argparse.Namespace, output: Path) -> Wanted:
    """Load the pair and see that what the options ask for can be made in `output`."""
    from varpi.samples.writing import check_space, image_side

    sampling, metadata = settings_of(options), None
    if options.geneval:
        metadata = _metadata(options)[: options.limit]
    prompts = _prompts(options)
    if metadata is not None:
        prompts = [record["prompt"] for record in metadata]
    pair = asked_pair(options)
    generator, tokenizer = pair.generator, pair.tokenizer
    if prompts is not None:
        prompts = _usable(options, prompts, generator.caption_check)
    side = image_side(generator, tokenizer, options.resize)

    def check(count: int) -> None:
        check_space(output, count, side)

    if prompts is None:
        condition = _classes(options, generator.num_classes, check)
    else:
        condition = _repeated(options, prompts, check)
    record = {"generator": options.generator, "generator_sha256": digest(options.generator)}
    if options.dtype != "float32":
        record["dtype"] = options.dtype
    return Wanted(
        generator,
        tokenizer,
        condition,
        side,
        sampling=sampling,
        record={**record, "tokenizer": options.tokenizer},
        resize=options.resize,
        batch_size=options.batch_size,
        graph=options.graph,
        geneval=metadata,
    )


def _write_geneval(output: Path, metadata: Sequence[Mapping[str, Any]], count: int) -> None:
    """Write output/geneval from the finished samples in `output`, whole or not at all."""
    from varpi.evaluation.geneval import write_geneval_folder
    from varpi.samples.reading import RECORD, open_samples

    samples, each = open_samples(output), count // len(metadata)
    groups = samples.batches([range(first, first + each) for first in range(0, count, each)])
    aside = output / ".geneval-unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    write_geneval_folder(aside, metadata, (group.images.permute(0, 2, 3, 1).numpy() for group in groups))
    shutil.copyfile(output / RECORD, aside / RECORD)
    aside.rename(output / "geneval")


def _prompts(options: argparse.Namespace) -> Any:
    """What to make images of: prompts, or a data set with captions; None when classes are asked for."""
    from varpi.data.prompts import read_prompts

    if options.per_prompt < 1 or (options.limit is not None and options.limit < 1):
        raise VarpiError("--per-prompt and --limit must be at least 1")
    if options.prompt is not None:
        return options.prompt[: options.limit]
    if options.prompts is not None:
        return read_prompts(options.prompts)[: options.limit]
    if options.captions is not None:
        dataset = open_captions(options)
        if dataset.num_classes is not None:
            raise VarpiError(f"--captions {options.captions}: it has classes, not captions; try --caption-column")
        return dataset
    return None


def _usable(options: argparse.Namespace, prompts: Any, check: Any) -> list[str]:
    """The prompts, once the generator can use each, or the captions of a data set that it can use."""
    from varpi.data import BadImage, Dropped
    from varpi.data.caption_check import checked
    from varpi.data.left_out import LeftOut
    from varpi.runtime.processes import find_world

    if isinstance(prompts, list):
        if check is not None:
            for i, prompt in enumerate(prompts):  # chosen one by one: none may be missing
                check(prompt, f"prompt {i}")
        return prompts
    dataset: Any = checked(prompts, check)
    left_out, found = LeftOut(), []
    for i in range(len(dataset)):
        if len(found) == options.limit:
            break
        try:
            found.append(dataset.caption(i))
        except (BadImage, Dropped) as error:
            left_out.note(error)
    where, looked_at = f"--captions {options.captions}", len(found) + len(left_out)
    if not found:
        raise VarpiError(f"{where}: none of its {looked_at} rows has a usable caption: {left_out}")
    if find_world(options.device).is_main:
        left_out.say(where, looked_at, "captions")
    return found


def open_captions(options: argparse.Namespace) -> Any:
    """The data set that --captions names."""
    from varpi.data import open_dataset

    return open_dataset(
        options.captions, image_size=32, split=options.caption_split, caption_column=options.caption_column
    )


def _metadata(options: argparse.Namespace) -> list[dict[str, Any]]:
    """GenEval's metadata of the prompts: a file, or what the captions' scenes say of themselves."""
    from varpi.data.prompts import read_geneval_metadata
    from varpi.data.shapes import CaptionedShapes

    if options.prompts is not None:
        return read_geneval_metadata(options.prompts)
    dataset = None if options.captions is None else open_captions(options)
    if not isinstance(dataset, CaptionedShapes):
        raise VarpiError("--geneval: give GenEval's metadata by --prompts, or --captions shapes")
    return [dataset.geneval_metadata(i) for i in range(min(len(dataset), options.limit or len(dataset)))]


def _repeated(options: argparse.Namespace, prompts: Sequence[str], check: Callable[[int], None]) -> list[str]:
    """Each prompt `per_prompt` times. check: is asked whether so many images can be made, before they take memory."""
    check(len(prompts) * options.per_prompt)
    return [prompt for prompt in prompts for _ in range(options.per_prompt)]


def class_ids(text: str) -> list[int]:
    """What --classes lists."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        ids = [2**63]
    if any(abs(one) >= 2**63 for one in ids):
        raise VarpiError(f"--classes {text}: expected whole numbers separated by commas")
    return ids


def _classes(options: argparse.Namespace, num_classes: int | None, check: Callable[[int], None]) -> Any:
    import torch

    if num_classes is None:
        raise VarpiError("this generator is conditioned on text: give --prompt, --prompts or --captions")
    if options.classes is not None:
        return torch.tensor(class_ids(options.classes))
    count = options.per_class if options.per_class is not None else options.count
    if count < 1:
        raise VarpiError(f"the number of images is {count}; it must be at least 1")
    if options.per_class is not None:
        check(count * num_classes)
        return torch.arange(num_classes).repeat(count)  # any run of neighbors is balanced, as for splits of scores
    check(count)
    return torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(options.seed))
