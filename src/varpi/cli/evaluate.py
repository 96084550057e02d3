"""`varpi evaluate`: measure images, or a generator."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from varpi.cli.options import add_device, command, digest, load_pair, recipe_of, say, warn
from varpi.cli.sample import add_sampling, write_samples
from varpi.cli.sampling_flags import settings_of
from varpi.errors import VarpiError


def add(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        run,
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
    add_device(parser)

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
    add_sampling(group, required=False)
    parser.set_defaults(geneval=False)


def run(options: argparse.Namespace) -> None:
    from varpi.evaluation.result import write_result

    if options.json and Path(options.json).is_dir():
        raise VarpiError(f"--json {options.json}: is a directory")
    result = _judge(options)
    if result is None:  # another process has it
        return
    for name, value in result.metrics.items():
        say(f"{name:>24}  {value:.6g}")
    sampling = result.sampling or {}
    shown = {
        name: value for name, value in sampling.items() if name not in ("classes", "prompts") and value is not None
    }
    about = {"samples": result.samples, "sampling": shown, "reference": result.reference, "evaluator": result.evaluator}
    for what, fields in about.items():
        if fields:
            say(f"{what:>24}  " + ", ".join(f"{key} {value}" for key, value in fields.items()))
    for warning in result.warnings:
        warn(f"warning: {warning}")
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
        generator, tokenizer = load_pair(options)
        return judging.judge_alignment(
            generator,
            tokenizer,
            recipe_of(options.samples),
            about={"generator": options.generator, "generator_sha256": digest(options.generator)},
            data=options.data,
            split=options.split,
            features=options.features,
            weights=options.weights,
            images=options.images,
            batch_size=options.batch_size,
            sampling=settings_of(options),
            device=choose_device(options.device),
            progress=progress,
        )
    world = judging.world_of(options.device)
    device = world.device if world is not None else choose_device(options.device)
    if judging.is_run(source):
        source = _samples_of_run(options, source, world)
    if options.kind == "text":
        from varpi.evaluation.text_scores import METRICS, evaluate_text
        from varpi.networks.clip import CLIP_B32

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
        from varpi.networks.clip import CLIP_L14, ClipColorist
        from varpi.networks.mask2former import MASK2FORMER, Mask2FormerDetector

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
    folder = judging.samples_folder(run, {**settings, **asdict(settings_of(options))})
    if (world is None or world.is_main) and not (folder / "sample.json").is_file():
        write_samples(options, folder)
        warn(f"wrote samples to {folder}")
    if world is not None:
        world.barrier()
    return folder
