"""`varpi evaluate`: measure images, or a generator."""

import argparse
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from varpi.cli.options import add_class_names, add_device, asked_pair, command, digest, say, warn
from varpi.cli.sample import Wanted, add_sampling, open_captions, prepare
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
        "goes on where it was (features and detections when --cache is given). Under torchrun the processes share the\n"
        "sampling of a run and the features of a distribution; the numbers are those of one process.",
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
    group.add_argument(
        "--features", default="inception", help="inception, dinov2, efficientnet-lite0, digits or cifar10 (%(default)s)"
    )
    group.add_argument("--weights", metavar="FILE", help="of the network (default: its cache, or a download)")
    group.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network")

    group = parser.add_argument_group("distribution")
    group.add_argument("--reference", help="an ADM .npz, images, or a dataset (for digits: its test split)")
    group.add_argument(
        "--reference-split", metavar="SPLIT", help="says that the reference is a dataset, and which part"
    )
    group.add_argument("--reference-column", default="image", help="of a dataset's images (default: %(default)s)")

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
    group.add_argument("--detector", metavar="SOURCE", help="Mask2Former's directory or Hub id, or `shapes`")
    group.add_argument("--colorist", metavar="SOURCE", help="weights of open_clip's ViT-L/14 (shapes has its own)")

    group = parser.add_argument_group("alignment")
    group.add_argument("--data", help="held-out images (default: those of the run)")
    group.add_argument("--split", default="validation", help="of them (default: %(default)s)")
    group.add_argument("--images", type=int, metavar="N", help="how many (default: all)")
    add_class_names(group)

    group = parser.add_argument_group("sampling, for a run")
    group.add_argument("--tokenizer", help="default: the run's")
    group.add_argument("--architecture")
    group.add_argument("--tokenizer-architecture")
    group.add_argument("--image-size", type=int)
    group.add_argument("--text-encoder", help="default: the run's")
    add_sampling(group, required=False)
    parser.set_defaults(geneval=False)


def run(options: argparse.Namespace) -> None:
    from varpi.evaluation.result import MARKER, write_result
    from varpi.runtime.files import check_output
    from varpi.runtime.processes import find_world

    if options.json:
        check_output("--json", options.json, marker=MARKER)
    if options.save_detections:
        check_output("--save-detections", options.save_detections)
    if options.batch_size < 1:
        raise VarpiError(f"--batch-size is {options.batch_size}; it must be at least 1")
    options.generator = options.samples
    world = find_world(options.device)
    result = _KINDS[options.kind](options, world, world.is_main and sys.stderr.isatty())
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


def _distribution(options: argparse.Namespace, world: Any, progress: bool) -> Any:
    """Distances of a set of images to a reference; with a judge of classes also what it sees."""
    from varpi.evaluation.agreement import AGREEMENT, class_agreement, classes_asked
    from varpi.evaluation.distribution import DistributionSettings, check_distribution, evaluate_distribution
    from varpi.evaluation.reference import open_reference
    from varpi.networks.judges import JUDGES
    from varpi.networks.loading import load_extractor
    from varpi.samples.reading import Announced, open_samples

    settings = DistributionSettings(
        inception_score_splits=options.splits,
        neighbors=options.neighbors,
        kid_subsets=options.kid_subsets,
        kid_subset_size=options.kid_subset_size,
    )
    metrics = _metrics(options)
    wanted_metrics = None if metrics is None else [name for name in metrics if name != AGREEMENT]
    if metrics is not None and AGREEMENT in metrics and options.features not in JUDGES:
        raise VarpiError(f"{AGREEMENT} is what a judge of classes sees; it needs --features {' or '.join(JUDGES)}")
    if world.size > 1 and options.cache is None:
        raise VarpiError("--cache is missing: a directory that all processes see, for the features that each computes")
    source, wanted = _find_samples(options)
    if wanted is None:
        samples: Any = open_samples(source)
    else:
        samples = Announced(str(source), wanted.count, wanted.side, wanted.asked)
    reference = options.reference or ("digits" if options.features == "digits" else None)
    if reference is None and (wanted_metrics is None or set(wanted_metrics) - {"is"}):
        raise VarpiError("--reference is missing: an ADM .npz, a folder of images, or a dataset with --reference-split")
    opened = None
    if reference is not None:
        opened = open_reference(
            reference,
            split=options.reference_split,
            image_size=samples.height,
            image_column=options.reference_column,
        )
    extractor = load_extractor(
        options.features, weights=options.weights, device=world.device, precision=options.precision
    )
    asked = classes_asked(samples.sampling, extractor) if options.features in JUDGES else None
    if asked is None and metrics is not None and AGREEMENT in metrics:
        raise VarpiError(
            f"{source}: no sample.json tells which classes of the judge were asked for; {AGREEMENT} needs them"
        )
    check_distribution(samples, opened, extractor=extractor, metrics=wanted_metrics, settings=settings)
    if wanted is not None:
        _make(wanted, source, options, world)
        samples = open_samples(source)
        del wanted  # the pair's memory
    result = evaluate_distribution(
        samples,
        opened,
        extractor=extractor,
        metrics=wanted_metrics,
        settings=settings,
        batch_size=options.batch_size,
        workers=options.workers,
        cache=Path(options.cache) if options.cache else None,
        world=world,
        device=world.device,
        progress=progress,
    )
    if result is None or asked is None or (metrics is not None and AGREEMENT not in metrics):
        return result
    agreement, by_class = class_agreement(samples, asked, extractor, options.batch_size)
    return dataclasses.replace(
        result,
        metrics={**result.metrics, AGREEMENT: agreement},
        details={**result.details, AGREEMENT: by_class},
    )


def _text(options: argparse.Namespace, world: Any, progress: bool) -> Any:
    """How well images fit their prompts. The processes share the sampling of a run; the main one measures."""
    from varpi.evaluation.text_scores import SCORES, evaluate_text, load_scorers
    from varpi.networks.clip import CLIP_B32

    source, wanted = _find_samples(options)
    if wanted is not None and "prompts" not in wanted.asked:
        raise VarpiError("--kind text needs samples of prompts; these are of classes")
    scorers = None
    if world.is_main:
        scorers = load_scorers(
            _metrics(options) or SCORES,
            clip_source=options.clip or CLIP_B32,
            hps_weights=options.hps_weights,
            hps_version=options.hps_version,
            device=world.device,
        )
    if wanted is not None:
        _make(wanted, source, options, world)
        del wanted
    if scorers is None:
        return None
    return evaluate_text(
        source,
        metrics=_metrics(options) or SCORES,
        scorers=scorers,
        batch_size=options.batch_size,
        progress=progress,
    )


def _geneval(options: argparse.Namespace, world: Any, progress: bool) -> Any:
    """GenEval's tasks. The processes share the sampling of a run; the main one measures."""
    from varpi.data.prompts import read_geneval_metadata
    from varpi.evaluation.detections import read_detections
    from varpi.evaluation.geneval import evaluate_geneval
    from varpi.networks.clip import CLIP_L14, ClipColorist
    from varpi.networks.mask2former import MASK2FORMER, Mask2FormerDetector
    from varpi.networks.shapes_detector import ShapesColorist, ShapesDetector

    if options.metrics is not None:
        raise VarpiError("--metrics: geneval has one fixed set of them")
    if options.detections is not None and (options.cache or options.save_detections):
        raise VarpiError("--cache and --save-detections keep what is detected here; leave them out with --detections")
    if options.metadata is not None:  # read for its refusals, before there are samples
        read_geneval_metadata(options.metadata)
    if options.detections is not None:
        read_detections(options.detections)
    options.geneval = _is_run(Path(options.samples).expanduser())
    source, wanted = _find_samples(options)
    detector: Any = None
    colorist: Any = None
    if options.detections is None and world.is_main:
        if options.detector == "shapes":
            if options.colorist is not None:
                raise VarpiError("--colorist: the detector of shapes names their colours itself; leave it out")
            detector = ShapesDetector(device=world.device)
            colorist = ShapesColorist(detector)
        else:
            detector = Mask2FormerDetector(options.detector or MASK2FORMER, device=world.device)
            colorist = ClipColorist(options.colorist or CLIP_L14, device=world.device)
    if wanted is not None:
        _make(wanted, source, options, world)
        del wanted
    if not world.is_main:
        return None
    cache = None
    if options.cache:
        cache = Path(options.cache, "detections.jsonl")
        cache.parent.mkdir(parents=True, exist_ok=True)
    return evaluate_geneval(
        source / "geneval" if options.geneval else source,
        detector=detector,
        colorist=colorist,
        detections=options.detections,
        metadata=options.metadata,
        cache=cache,
        save=options.save_detections,
        progress=progress,
    )


def _alignment(options: argparse.Namespace, world: Any, progress: bool) -> Any:
    """Alignment on the held-out images of --data, or of the run's own source; reward and β are the run's."""
    from varpi.data import open_dataset
    from varpi.data.classes import check_subset, read_classes
    from varpi.data.opening import open_split
    from varpi.evaluation.alignment import evaluate_alignment
    from varpi.methods.rewards import Reward, load_reward_network
    from varpi.networks.loading import load_extractor
    from varpi.weights.pair import recipe_of

    if options.metrics is not None:
        raise VarpiError("--metrics: alignment has one fixed set of them")
    if not world.is_main:
        return None
    pair = asked_pair(options)
    generator, tokenizer = pair.generator, pair.tokenizer
    recipe = recipe_of(options.samples)
    if options.data is not None:
        source = options.data
        named = pair.class_names if options.class_names is None else read_classes(options.class_names)
        dataset = open_dataset(source, image_size=pair.image_size, split=options.split, classes=named)
    elif recipe is None:
        raise VarpiError("--data is missing: the held-out images to measure alignment on")
    elif options.class_names is not None:
        raise VarpiError("--class-names is for --data; the classes of a run's own data are those of its recipe")
    else:
        source, named = recipe.data.source, pair.class_names
        dataset = open_split(recipe.data, options.split, named)
    if named is None and dataset.class_names is not None and generator.num_classes is not None:
        check_subset(dataset.class_names, generator.num_classes, source)
    chosen: dict[str, Any] = {"perceptual_weight": 0.0}
    perceptual = None
    settings = {} if recipe is None else dict(recipe.method)
    reward = settings.get("reward")
    if isinstance(reward, Reward):
        chosen = {"mse_weight": reward.mse_weight, "perceptual_weight": reward.perceptual_weight}
        perceptual = load_reward_network(reward, world.device)
    chosen |= {name: settings[name] for name in ("prior_weight", "context_noise") if name in settings}
    if (last := settings.get("context_noise_end")) is not None:
        chosen["context_noise"] = last
    result = evaluate_alignment(
        generator,
        tokenizer,
        dataset,
        extractor=load_extractor(
            options.features, weights=options.weights, device=world.device, precision=options.precision
        ),
        perceptual=perceptual,
        images=options.images,
        batch_size=options.batch_size,
        sampling=settings_of(options),
        progress=progress,
        **chosen,
    )
    about = {"generator": options.generator, "generator_sha256": digest(options.generator)}
    return dataclasses.replace(result, sampling={**about, **(result.sampling or {})})


_KINDS = {"distribution": _distribution, "text": _text, "geneval": _geneval, "alignment": _alignment}


def _metrics(options: argparse.Namespace) -> list[str] | None:
    return options.metrics.split(",") if options.metrics else None


def _is_run(path: Path) -> bool:
    """Whether a directory holds a training run with a model."""
    return (path / "recipe.yaml").is_file() and (path / "model.safetensors").is_file()


def _find_samples(options: argparse.Namespace) -> tuple[Path, Wanted | None]:
    """Where the samples are, and for a run, what is to be made there before they are."""
    source = Path(options.samples).expanduser()
    if not _is_run(source):
        return source, None
    if not any(getattr(options, name) for name in _ASKED):
        raise VarpiError(f"{source} is a run: say what to sample from it (--per-class N, --prompts FILE, …)")
    model = (source / "model.safetensors").stat()
    settings = {name: getattr(options, name) for name in (*_ASKED, *_SHAPE)} | dataclasses.asdict(settings_of(options))
    contents = options.prompts and digest(options.prompts)
    if options.captions is not None:
        contents = open_captions(options).fingerprint
    key = json.dumps([settings, contents, model.st_size, model.st_mtime_ns], sort_keys=True, default=str)
    folder = source / "samples" / hashlib.sha256(key.encode()).hexdigest()[:12]
    return folder, None if _are_made(folder, options) else prepare(options, folder)


def _are_made(folder: Path, options: argparse.Namespace) -> bool:
    from varpi.samples.reading import RECORD

    return (folder / RECORD).is_file() and (not options.geneval or (folder / "geneval").is_dir())


_ASKED = ("classes", "per_class", "count", "prompt", "prompts", "captions")
_SHAPE = (
    "per_prompt",
    "caption_split",
    "caption_column",
    "limit",
    "resize",
    "tokenizer",
    "tokenizer_architecture",
    "architecture",
    "image_size",
    "text_encoder",
    "dtype",
)
"""What else than `_ASKED` and the settings of sampling decides a run's samples."""


def _make(wanted: Wanted, folder: Path, options: argparse.Namespace, world: Any) -> None:
    """Make the samples, unless another evaluation has made them meanwhile. Raises InUse while one is at it."""
    from varpi.training.run_directory import RunLock

    with RunLock(folder) as lock:
        if world.is_main:
            lock.take()
        if not _are_made(folder, options) and wanted.make(folder, world, together=True) and world.is_main:
            warn(f"wrote samples to {folder}")
