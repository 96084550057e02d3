"""The command line: demo, train, sample, evaluate, encode, export, report, doctor."""

import argparse
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from varpi.errors import VarpiError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it did what was asked, 2 for input that is refused."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        options.run(options)
    except VarpiError as error:
        print(f"varpi {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, or a place that may not be read or written
        where = f"{error.filename}: " if error.filename else ""
        print(f"varpi {options.command}: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"varpi {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="varpi",
        description="Post-train autoregressive image generators so that their tokens decode into real images.",
        epilog="`varpi COMMAND --help` explains one. Start with `varpi demo`; `varpi doctor` checks this machine.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_encode(commands)
    _add_export(commands)
    _add_report(commands)
    _add_doctor(commands)
    return parser


def _command(commands: Any, name: str, run: Any, short: str, long: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=short, description=long, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "the whole job on the embedded digits, in minutes on a CPU",
        "Evaluate the embedded generator, post-train it with VA-π and, as a control, with cross-entropy alone,\n"
        "evaluate again, and write report.html and metrics.json. Needs no network.",
    )
    parser.add_argument("--output", default="runs/demo", help="directory for the results (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    parser.add_argument("--samples", type=int, default=1000, help="images per evaluation (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds per evaluation (default: %(default)s)")


def _demo(options: argparse.Namespace) -> None:
    from varpi.studies.demo import demo

    page = demo(Path(options.output), steps=options.steps, samples=options.samples, seeds=options.seeds)
    print(f"wrote {page} and {page.with_name('metrics.json')}")


def _add_train(commands: Any) -> None:
    from varpi.recipe import shipped_recipes

    parser = _command(
        commands,
        "train",
        _train,
        "carry out a recipe",
        "Carry out a recipe: a YAML file, or one that ships with varpi:\n"
        f"  {', '.join(shipped_recipes())}\n\n"
        "Under torchrun the model is sharded over all processes:\n"
        "  torchrun --nproc-per-node 8 -m varpi train llamagen-c2i-xxl --set data.source=data/imagenet/train",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    parser.add_argument("--output", help="run directory (default: runs/ and the recipe's name)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="change a value of the recipe, for instance --set optimizer.learning_rate=2e-6; may be repeated",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in the run directory"
    )
    _add_device(parser)
    parser.add_argument("--print-recipe", action="store_true", help="print the complete recipe and stop")


def _train(options: argparse.Namespace) -> None:
    from varpi.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.settings)
    if options.print_recipe:
        print(recipe.to_yaml(), end="")
        return
    from varpi.training import train

    run = train(
        recipe,
        options.output or Path("runs", Path(options.recipe).stem),
        resume=options.resume,
        device=options.device,
    )
    if os.environ.get("RANK", "0") == "0" and (run / "model.safetensors").is_file():
        print(f"wrote {run / 'model.safetensors'}")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")


def _add_pair(parser: argparse.ArgumentParser) -> None:
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
    _add_device(parser)


def _load_pair(options: argparse.Namespace) -> tuple[Any, Any]:
    from varpi.generators.pretrained import PretrainedGenerator
    from varpi.runtime.processes import choose_device
    from varpi.weights import check_pair, load_generator, load_tokenizer
    from varpi.weights.pair import give_text_encoder

    device = choose_device(options.device)
    recipe = _recipe_of(options.generator)
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


def _recipe_of(source: str) -> Any:
    """The recipe of a run directory; None for anything else."""
    from varpi.recipe import parse_recipe, read_yaml

    path = Path(source, "recipe.yaml")
    return parse_recipe(read_yaml(path), str(path)) if path.is_file() else None


def _add_sampling(parser: Any, *, required: bool) -> None:
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
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="1 is no guidance (default: %(default)s)")
    parser.add_argument(
        "--guidance-interval", type=int, default=-1, metavar="K", help="guide only the first K+2 tokens"
    )
    parser.add_argument("--guidance-schedule", choices=("constant", "power-cosine"), default="constant")
    parser.add_argument("--guidance-power", type=float, default=2.0, help="of power-cosine (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default)")
    parser.add_argument("--greedy", action="store_true", help="always the most probable token")
    parser.add_argument(
        "--resize", type=int, metavar="S", help="resize from 384 to 256 as the paper does; S must be 256"
    )


def _add_sample(commands: Any) -> None:
    parser = _command(
        commands,
        "sample",
        _sample,
        "generate images",
        "Generate images free-running, of classes or of prompts, as the generator is conditioned. Writes\n"
        "OUTPUT/00000.png …, grid.png, samples.npz (ADM's layout: arr_0) and sample.json with every setting;\n"
        "with --geneval also OUTPUT/geneval in GenEval's layout.",
    )
    _add_pair(parser)
    parser.add_argument("--output", required=True, help="directory for the images; must not exist or be empty")
    _add_sampling(parser, required=True)
    parser.add_argument("--batch-size", type=int, default=64, help="images in flight (default: %(default)s)")
    parser.add_argument(
        "--geneval", action="store_true", help="the file of --prompts is GenEval's metadata: write its folders too"
    )


def _sample(options: argparse.Namespace) -> None:
    output = _fresh_directory(options.output)
    count = _write_samples(options, output)
    print(f"wrote {count} images to {output}")


def _write_samples(options: argparse.Namespace, output: Path) -> int:
    """Generate what the options ask for into `output`."""
    from varpi.samples.writing import write_samples

    prompts = _prompts(options)
    generator, tokenizer = _load_pair(options)
    condition: Any = _classes(options, generator.num_classes) if prompts is None else prompts
    settings = _sampling(options)
    record = {"generator": options.generator, "generator_sha256": _digest(options.generator)}
    count = write_samples(
        output,
        generator,
        tokenizer,
        condition,
        settings=settings,
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
    from PIL import Image

    from varpi.data.prompts import read_geneval_metadata
    from varpi.evaluation.geneval import write_geneval_folder

    if options.prompts is None:
        raise VarpiError("--geneval: give GenEval's metadata by --prompts")
    metadata = read_geneval_metadata(options.prompts)[: options.limit]
    files = [
        [output / f"{prompt * options.per_prompt + i:05d}.png" for i in range(options.per_prompt)]
        for prompt in range(len(metadata))
    ]
    images = (np.stack([np.asarray(Image.open(file).convert("RGB")) for file in group]) for group in files)
    write_geneval_folder(output / "geneval", metadata, images)
    shutil.copyfile(output / "sample.json", output / "geneval" / "sample.json")


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    from varpi.samples.writing import SETTINGS

    return {name: getattr(options, name) for name in SETTINGS}


def _digest(source: str) -> str | None:
    """The sha256 of a generator's weights, of a file or of a run's; None where there is no one file."""
    from varpi.weights import sha256_of

    path = Path(source, "model.safetensors") if Path(source).is_dir() else Path(source)
    return sha256_of(path) if path.is_file() else None


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


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure images, or a generator",
        "Measure SAMPLES: a directory of `varpi sample`, a folder of images, an .npz, or a training run, whose\n"
        "samples are made first (by the options of sampling) and kept in RUN/samples. One of four kinds:\n"
        "  distribution  distances to real images: FID, sFID, Inception Score, precision, recall, KID\n"
        "  text          how well images fit their prompts: CLIP score, HPS v2.1\n"
        "  geneval       GenEval's six tasks, on a folder in its layout\n"
        "  alignment     of a generator, on held-out images: the two terms of the lower bound, exposure bias,\n"
        "                round trips through the tokenizer\n"
        "Every result file says by what, against what and on what samples its numbers were measured. Interrupted, it\n"
        "goes on where it was when --cache is given; under torchrun the processes share a distribution.",
    )
    parser.add_argument("samples", metavar="SAMPLES", help="images, a run, or (alignment) a generator")
    kinds = ("distribution", "text", "geneval", "alignment")
    parser.add_argument("--kind", choices=kinds, default="distribution", help="default: %(default)s")
    parser.add_argument("--metrics", help="separated by commas (default: all that the rest allows)")
    parser.add_argument("--json", metavar="PATH", help="write the result here")
    parser.add_argument("--cache", metavar="DIR", help="keep features or detections here, and use them again")
    parser.add_argument("--batch-size", type=int, default=64, help="images at once (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images (default: %(default)s)")
    _add_device(parser)

    group = parser.add_argument_group("distribution and alignment")
    group.add_argument("--features", default="inception", help="inception, dinov2 or digits (default: %(default)s)")
    group.add_argument("--weights", metavar="FILE", help="of the network (default: its cache, or a download)")
    group.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")
    group.add_argument("--reference", help="an ADM .npz, images, or a dataset (for digits: its test split)")
    group.add_argument(
        "--reference-split", metavar="SPLIT", help="says that the reference is a dataset, and which part"
    )

    group = parser.add_argument_group("distribution, what moves a number; the defaults are the ADM evaluator's")
    group.add_argument("--splits", type=int, default=10, help="of the Inception Score (default: %(default)s)")
    group.add_argument("--neighbors", type=int, default=3, help="k of precision and recall (default: %(default)s)")
    group.add_argument("--kid-subsets", type=int, default=100, help="default: %(default)s")
    group.add_argument("--kid-subset-size", type=int, default=1000, help="images (default: %(default)s)")

    group = parser.add_argument_group("text")
    group.add_argument("--clip", metavar="SOURCE", help="CLIP's directory or Hub id (openai/clip-vit-base-patch32)")
    group.add_argument("--hps-weights", metavar="FILE", help="of HPS (default: xswu/HPSv2 from the Hub)")
    group.add_argument("--hps-version", choices=("v2.1", "v2.0"), default="v2.1", help="default: %(default)s")

    group = parser.add_argument_group("geneval")
    group.add_argument("--metadata", metavar="FILE", help="GenEval's own file, to find missing prompts")
    group.add_argument("--detections", metavar="FILE", help="what another detector saw, as JSON; none is run then")
    group.add_argument("--save-detections", metavar="FILE", help="write what is detected, in that form")
    group.add_argument("--detector", metavar="SOURCE", help="Mask2Former's directory or Hub id")
    group.add_argument("--colorist", metavar="SOURCE", help="weights of open_clip's ViT-L/14")

    group = parser.add_argument_group("alignment")
    group.add_argument("--data", help="held-out images (default: those of the run)")
    group.add_argument("--split", default="validation", help="of them (default: %(default)s)")
    group.add_argument("--images", type=int, metavar="N", help="how many (default: all)")

    group = parser.add_argument_group("sampling, for a run")
    group.add_argument("--tokenizer", help="default: the run's")
    group.add_argument("--architecture")
    group.add_argument("--tokenizer-architecture")
    group.add_argument("--image-size", type=int)
    group.add_argument("--text-encoder", help="default: the run's")
    _add_sampling(group, required=False)
    parser.set_defaults(geneval=False)


def _evaluate(options: argparse.Namespace) -> None:
    from varpi.evaluation.result import write_result

    if options.json and Path(options.json).is_dir():
        raise VarpiError(f"--json {options.json}: is a directory")
    result = _judge(options)
    if result is None:  # another process has it
        return
    for name, value in result.metrics.items():
        print(f"{name:>24}  {value:.6g}")
    sampling = result.sampling or {}
    shown = {
        name: value for name, value in sampling.items() if name not in ("classes", "prompts") and value is not None
    }
    about = {"samples": result.samples, "sampling": shown, "reference": result.reference, "evaluator": result.evaluator}
    for what, fields in about.items():
        if fields:
            print(f"{what:>24}  " + ", ".join(f"{key} {value}" for key, value in fields.items()))
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.json:
        write_result(Path(options.json), result)


def _judge(options: argparse.Namespace) -> Any:
    from varpi.evaluation import judging
    from varpi.runtime.processes import choose_device

    source, progress = Path(options.samples).expanduser(), sys.stderr.isatty()
    metrics = options.metrics.split(",") if options.metrics else None
    cache = Path(options.cache) if options.cache else None
    options.generator = options.samples
    if options.batch_size < 1:
        raise VarpiError(f"--batch-size is {options.batch_size}; it must be at least 1")
    if options.kind == "alignment":
        if metrics is not None:
            raise VarpiError("--metrics: alignment has one fixed set of them")
        generator, tokenizer = _load_pair(options)
        return judging.judge_alignment(
            generator,
            tokenizer,
            _recipe_of(options.samples),
            about={"generator": options.generator, "generator_sha256": _digest(options.generator)},
            data=options.data,
            split=options.split,
            features=options.features,
            weights=options.weights,
            images=options.images,
            batch_size=options.batch_size,
            seed=options.seed,
            sampling=_sampling(options),
            device=choose_device(options.device),
            progress=progress,
        )
    world = judging.world_of(options.device)
    device = world.device if world is not None else choose_device(options.device)
    if judging.is_run(source):
        source = _samples_of_run(options, source, world)
    if options.kind == "text":
        from varpi.evaluation.text_scores import CLIP_B32, METRICS, evaluate_text

        return evaluate_text(
            source,
            metrics=metrics or METRICS,
            clip_source=options.clip or CLIP_B32,
            hps_weights=options.hps_weights,
            hps_version=options.hps_version,
            device=device,
            batch_size=options.batch_size,
            progress=progress,
        )
    if options.kind == "geneval":
        from varpi.evaluation.geneval import evaluate_geneval
        from varpi.networks.detectors import CLIP_L14, MASK2FORMER, ClipColorist, Mask2FormerDetector

        if metrics is not None:
            raise VarpiError("--metrics: geneval has one fixed set of them")
        seen = options.detections is not None
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            cache = cache / "detections.jsonl"
        return evaluate_geneval(
            source,
            detector=None if seen else Mask2FormerDetector(options.detector or MASK2FORMER, device=device),
            colorist=None if seen else ClipColorist(options.colorist or CLIP_L14, device=device),
            detections=options.detections,
            metadata=options.metadata,
            cache=cache,
            save=options.save_detections,
            progress=progress,
        )
    from varpi.evaluation.distribution import Settings

    return judging.judge_distribution(
        source,
        settings=Settings(
            inception_score_splits=options.splits,
            neighbors=options.neighbors,
            kid_subsets=options.kid_subsets,
            kid_subset_size=options.kid_subset_size,
        ),
        features=options.features,
        reference=options.reference,
        reference_split=options.reference_split,
        metrics=metrics,
        weights=options.weights,
        precision=options.precision,
        batch_size=options.batch_size,
        workers=options.workers,
        cache=cache,
        device=device,
        world=world,
        progress=progress,
    )


def _samples_of_run(options: argparse.Namespace, run: Path, world: Any) -> Path:
    """The run's samples of these options, made unless they are there."""
    from varpi.evaluation import judging

    asked = ("classes", "per_class", "count", "prompt", "prompts", "captions", "per_prompt", "caption_split", "limit")
    settings = {name: getattr(options, name) for name in (*asked, "caption_column", "resize")}
    if not any(settings[name] for name in asked[:6]):
        raise VarpiError(f"{run} is a run: say what to sample from it (--per-class N, --prompts FILE, …)")
    folder = judging.samples_folder(run, {**settings, **_sampling(options)})
    if (world is None or world.is_main) and not (folder / "sample.json").is_file():
        _write_samples(options, folder)
        print(f"wrote samples to {folder}", file=sys.stderr)
    if world is not None:
        world.barrier()
    return folder


def _add_encode(commands: Any) -> None:
    group = _command(
        commands,
        "encode",
        None,
        "turn images into tokens, or captions into features",
        "Do once what training would do again and again: `varpi encode images` and `varpi encode captions`.",
    )
    kinds = group.add_subparsers(dest="kind", required=True, metavar="KIND")
    parser = _command(
        kinds,
        "images",
        _encode_images,
        "images into tokens",
        "Encode every image of a data source. Writes a safetensors file: tokens int32 (images, N), indices int64, and\n"
        "classes int64 where the source has them.",
    )
    parser.add_argument(
        "data", metavar="DATA", help="folder of class folders, HF dataset, parquet, Hub id, or `digits`"
    )
    parser.add_argument("--tokenizer", required=True, help="checkpoint, Hub id, or `digits`")
    parser.add_argument("--tokenizer-architecture", help="of a foreign tokenizer: vq-16 or vq-8")
    parser.add_argument("--image-size", type=int, required=True, help="pixels per side")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    _add_device(parser)
    parser.add_argument("--output", required=True, help="the safetensors file to write")

    parser = _command(
        kinds,
        "captions",
        _encode_captions,
        "captions into T5 features",
        "Encode every caption of a data source for LlamaGen, a file each, in its own layout: OUTPUT/SHARD/SAMPLE.npy\n"
        "for tar shards, OUTPUT/FILE/LINE.npy for jsonl files, OUTPUT/rows/ROW.npy for tables. Train with them by\n"
        "--set data.caption_features=OUTPUT. Files that are there already are kept, so an interrupted run goes on;\n"
        "under torchrun every process encodes its share.",
    )
    parser.add_argument("data", metavar="DATA", help="tar shards, jsonl files, HF dataset, parquet, or Hub id")
    parser.add_argument("--text-encoder", default="google/flan-t5-xl", help="T5 directory or Hub id (%(default)s)")
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
    _add_device(parser)
    parser.add_argument("--output", required=True, help="the folder of the features")


def _encode_captions(options: argparse.Namespace) -> None:
    from varpi.data import open_dataset
    from varpi.data.caption_features import encode_captions
    from varpi.data.text_encoder import TextEncoder
    from varpi.runtime.processes import choose_device

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(options.device)
    if device == "cuda" and world_size > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if options.batch_size < 1:
        raise VarpiError(f"--batch-size is {options.batch_size}; it must be at least 1")
    dataset: Any = open_dataset(
        options.data, image_size=1, split=options.split, caption_column=options.caption_column, min_side=0
    )
    if dataset.num_classes is not None:
        raise VarpiError(f"{options.data}: it has classes, not captions; try --caption-column")
    counts = encode_captions(
        dataset,
        TextEncoder(options.text_encoder, max_tokens=options.max_tokens, device=device),
        Path(options.output),
        form=options.format,
        batch_size=options.batch_size,
        rank=rank,
        world_size=world_size,
        progress=rank == 0 and sys.stderr.isatty(),
    )
    print(
        f"wrote the features of {counts.written} captions to {options.output}; {counts.kept} were there already, "
        f"{counts.dropped} of {len(dataset)} rows have no usable caption"
    )


def _encode_images(options: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import save_file

    from varpi.data import BadImage, Dropped, open_dataset
    from varpi.runtime.files import write_aside
    from varpi.runtime.processes import choose_device
    from varpi.weights import load_tokenizer

    device = choose_device(options.device)
    if options.batch_size < 1:
        raise VarpiError(f"--batch-size is {options.batch_size}; it must be at least 1")
    if Path(options.output).exists():
        raise VarpiError(f"{options.output} already exists; choose another --output")
    dataset = open_dataset(options.data, image_size=options.image_size, split=options.split)
    tokenizer = load_tokenizer(options.tokenizer, architecture=options.tokenizer_architecture, device=device)
    tokens, classes, indices = [], [], []
    for start in range(0, len(dataset), options.batch_size):
        images = []
        for index in range(start, min(start + options.batch_size, len(dataset))):
            try:
                item = dataset[index]
            except (BadImage, Dropped) as error:
                print(f"skipped: {error}", file=sys.stderr)
                continue
            images.append(item.image)
            classes.append(item.condition)
            indices.append(index)
        if images:
            tokens.append(tokenizer.encode(torch.stack(images).to(device)).int().cpu())
    if not tokens:
        raise VarpiError(f"{options.data}: none of its {len(dataset)} images could be read")
    tensors = {"tokens": torch.cat(tokens), "indices": torch.tensor(indices)}
    if dataset.num_classes is not None:
        tensors["classes"] = torch.tensor(classes)
    metadata = {"data": options.data, "fingerprint": dataset.fingerprint, "tokenizer": options.tokenizer}
    write_aside(options.output, lambda aside: save_file(tensors, aside, metadata=metadata))
    print(f"wrote the tokens of {len(indices)} of {len(dataset)} images to {options.output}")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands,
        "export",
        _export,
        "write a checkpoint that the original code loads",
        "Write a generator or tokenizer under the names of LlamaGen's released files: a plain dictionary of tensors\n"
        "(torch.save), or safetensors when the output's name ends so. A transformers model (Janus) becomes a\n"
        "directory for from_pretrained. Adapters (LoRA) are merged.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="run directory, file, or `digits`")
    parser.add_argument("--output", required=True, help="the file (.pt, .pth, .safetensors) or directory to write")
    parser.add_argument("--tokenizer", action="store_true", help="the checkpoint is a tokenizer")


def _export(options: argparse.Namespace) -> None:
    from varpi.weights import export_original, load_generator, load_tokenizer

    if Path(options.output).exists():
        raise VarpiError(f"{options.output} already exists; choose another --output")
    model = load_tokenizer(options.checkpoint) if options.tokenizer else load_generator(options.checkpoint)
    export_original(model, options.output)
    print(f"wrote {options.output}")


def _add_report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        _report,
        "write the page of a run, or of a comparison",
        "Of a run: RUN/report.html with learning curves, samples before and after from the same seeds, settings,\n"
        "cost.\n"
        "Of results that `varpi evaluate --json` wrote: a comparison, for instance\n"
        "  varpi report --compare base=base.json tuned=tuned.json --output page.html\n"
        "with tables (several results of one name are sampling seeds), the same samples side by side, changes by\n"
        "class, worst and best samples, and with --embeddings the density and a map of image features.",
    )
    parser.add_argument("run_directory", metavar="RUN", nargs="?", help="directory of a training run")
    parser.add_argument(
        "--samples", type=int, default=4, help="images per class or caption, 0 for none (default: %(default)s)"
    )
    parser.add_argument("--compare", nargs="+", metavar="NAME=RESULT", help="result files; the base first")
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME=RUN", help="runs, for curves and costs")
    parser.add_argument("--embeddings", metavar="FEATURES", help="inception, dinov2 or digits")
    parser.add_argument("--weights", metavar="FILE", help="of that network")
    parser.add_argument("--output", help="the page to write, of a comparison")
    _add_device(parser)


def _report(options: argparse.Namespace) -> None:
    from varpi.runtime.processes import choose_device

    device = choose_device(options.device)
    if (options.run_directory is None) == (options.compare is None):
        raise VarpiError("give either a RUN or results to --compare")
    if options.run_directory is not None:
        from varpi.report.run import report_run

        page = report_run(Path(options.run_directory), per_condition=options.samples, device=device)
    else:
        from varpi.networks.extractors import load_extractor
        from varpi.report.compare import read_named, report_comparison

        if options.output is None:
            raise VarpiError("--output is missing: the page to write")
        extractor = None
        if options.embeddings:
            extractor = load_extractor(options.embeddings, weights=options.weights, device=device)
        page = report_comparison(
            Path(options.output),
            read_named(options.compare),
            runs={name: paths[0] for name, paths in read_named(options.runs).items()},
            extractor=extractor,
            command="varpi " + shlex.join(sys.argv[1:]),
        )
    print(f"wrote {page}")


def _add_doctor(commands: Any) -> None:
    _command(
        commands,
        "doctor",
        _doctor,
        "show versions, devices, and what can be run here",
        "Print what is installed, the devices that torch sees, and which optional parts are present.",
    )


def _doctor(options: argparse.Namespace) -> None:
    from varpi.cli.doctor import report

    for what, finding in report():
        print(f"{what:>22}  {finding}")
