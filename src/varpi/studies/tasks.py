"""What the jobs of a study do: look at the pair, count, train, see the reference, draw tokens, measure.

Each is a function of its folder and its arguments, runs in any process, and gives its result as JSON.

Shapes: n images of N tokens.
"""

import hashlib
import json
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from varpi.data.opening import open_batches
from varpi.data.pixels import to_uint8
from varpi.data.prompts import GENEVAL_TASKS
from varpi.data.rendering import render_scene
from varpi.data.shapes import CaptionedShapes
from varpi.errors import VarpiError
from varpi.evaluation import evaluate_distribution, open_reference
from varpi.evaluation.agreement import AGREEMENT
from varpi.evaluation.distribution import METRICS, check_distribution
from varpi.evaluation.feature_store import FeatureStore
from varpi.evaluation.geneval import SETTINGS as GENEVAL_SETTINGS
from varpi.evaluation.geneval import judge_geneval
from varpi.evaluation.reference import Reference
from varpi.methods import build_method
from varpi.networks.extractors import Network
from varpi.networks.judges import JUDGES
from varpi.networks.loading import load_extractor
from varpi.networks.shapes_detector import ShapesColorist, ShapesDetector
from varpi.recipe import Recipe
from varpi.runtime.files import read_json, write_aside
from varpi.runtime.processes import World
from varpi.runtime.tensors import sha256_of
from varpi.samples.reading import Announced, SampleSet
from varpi.sampling.generate import generate_with
from varpi.sampling.settings import Sampling
from varpi.studies.plan import SHAPES_DETECTOR, Judge, StudyData
from varpi.tokenizers import Tokenizer
from varpi.training import read_metrics, train
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress
from varpi.weights.pair import RUN_MODEL, Pair, open_pair

MEASURES = {
    "frechet_distance": "fid",
    "inception_score": "is",
    "precision": "precision",
    "recall": "recall",
    "kernel_distance": "kid",
}
"""What the distribution's metrics are called here, on every network alike, and in `evaluation.distribution`."""
TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class Weights:
    """A pair, by where it lies and by what it holds."""

    place: str
    """Whose it is: a variant's, with its trial and seed, as the part of a path."""
    generator: str
    tokenizer: str
    generator_sha256: str
    tokenizer_sha256: str
    """Of the files that the start's come in; of what a study trained, of the tensors."""

    @property
    def hashes(self) -> dict[str, str]:
        return {"generator_sha256": self.generator_sha256, "tokenizer_sha256": self.tokenizer_sha256}


def look_at_pair(folder: Path, weights: Weights, data: StudyData) -> dict[str, Any]:
    """What the start pair makes: classes, tokens an image, pixels. Raises VarpiError where that is not the data's."""
    pair = open_pair(weights.generator, tokenizer=weights.tokenizer)
    if pair.image_size != data.image_size:
        raise VarpiError(f"data.image_size is {data.image_size}, and the pair makes images of {pair.image_size} pixels")
    if pair.generator.num_classes is None:
        if data.source != "shapes":
            raise VarpiError(f"{weights.generator}: is conditioned on text; a study knows captions of shapes alone")
        if pair.generator.text_encoder is None:
            raise VarpiError(f"{weights.generator}: names no text encoder; start with `shapes`, or a run's model")
    return {
        "num_classes": pair.generator.num_classes,
        "num_tokens": pair.generator.num_tokens,
        "parameters": sum(parameter.numel() for parameter in pair.generator.parameters()),
    }


def count_operations(folder: Path, recipe: Recipe, device: str) -> dict[str, Any]:
    """The operations of one update, two a multiply-add: products of matrices, convolutions, attention; all networks.

    Counted on the first batch. The optimizer, and what goes element by element, are left out.
    """
    with torch.random.fork_rng():
        batches = open_batches(recipe, World(0, 1, device))
        method = build_method(recipe, batches.num_classes, device)
        trainer = Trainer(recipe, method, make_optimizer(method.model, recipe.optimizer), World(0, 1, device))
        stream = batches.from_cursor(0)
        with FlopCounterMode(display=False) as counter:
            updates = sum(1 for _ in trainer.updates(next(stream), 0, Progress()))
        stream.close()
    return {"operations": counter.get_total_flops() / updates}


def train_variant(folder: Path, recipe: Recipe, device: str) -> dict[str, Any]:
    """Carry out a recipe in folder/run, from its newest checkpoint if there is one.

    The result holds where the weights lie, what they are, and the cost; of a run that diverged, in what words.
    """
    run = folder / "run"
    try:
        train(recipe, run, resume=True, device=device, show=False)
    except VarpiError as error:
        if isinstance(error.__cause__, FloatingPointError | OverflowError):
            return {"diverged": str(error).replace(f"{folder}/", "")}
        raise
    rows = [row for row in read_metrics(run) if "loss" in row]
    training = recipe.training
    return {
        **_identify(run / RUN_MODEL),
        "data": read_json(run / "data.json")["fingerprint"],
        "steps": len(rows),
        "images": len(rows) * training.batch_size // training.updates_per_batch,
        "seconds": round(sum(row["seconds"] for row in rows), 2),
    }


def see_reference(folder: Path, data: StudyData, split: str, judge: Judge, cache: Path, device: str) -> dict[str, Any]:
    """Put the features of a split's images where measurements find them."""
    reference, extractor = _reference(data, split), _judge(judge, device)
    assert reference.images is not None
    store = FeatureStore.of(cache, reference.images, extractor)
    store.extract(extractor, batch_size=100, workers=0, share=(0, 1), progress=False)
    return {"sha256": store.sha256(), "count": reference.images.count}


@dataclass(frozen=True)
class Subject:
    """What images are drawn of."""

    classes: int | None
    """As many of each; None: of captions."""
    data: StudyData
    split: str
    """Whose first captions are asked for."""

    def first(self, count: int) -> list[int] | list[str]:
        if self.classes is not None:
            return [i % self.classes for i in range(count)]
        scenes = _scenes(self.data, self.split)
        return [scenes.caption(i) for i in range(count)]


def draw_tokens(
    folder: Path,
    weights: Weights,
    asked: Subject,
    sampling: Sampling,
    count: int,
    batch_size: int,
    shown: int,
    device: str,
) -> dict[str, Any]:
    """Sample `count` images as folder/tokens.safetensors: int32 (n,N).

    The result holds the tokens of the first `shown`, for whoever has no more than that.
    """
    begun = time.perf_counter()
    pair = _pair(weights, device)
    tokens = generate_with(pair.generator, asked.first(count), sampling, batch_size=batch_size).cpu().int()
    write_aside(folder / TOKENS, lambda aside: save_file({"tokens": tokens}, aside))
    guided = sampling.guidance_scale > 1
    return {
        "sha256": sha256_of(folder / TOKENS),
        "passes": tokens.shape[1] * (2 if guided else 1),
        "seconds": round(time.perf_counter() - begun, 2),
        **({"shown": tokens[:shown].tolist()} if shown else {}),
    }


def measure_tokens(
    folder: Path,
    drawn: Path,
    weights: Weights,
    asked: Subject,
    judge: Judge,
    metrics: Sequence[str],
    batch_size: int,
    cache: Path,
    device: str,
) -> dict[str, Any]:
    """What a judge sees in drawn tokens beside a split: the metrics that it has streams for, and warnings.

    Of images of captions, by the detector of shapes: the share of them, by task, that show what was asked for.
    """
    begun = time.perf_counter()
    if judge.name == SHAPES_DETECTOR:
        numbers, warnings = _see_captions(drawn, weights, asked, judge, batch_size, device), []
    else:
        numbers, warnings = _see_classes(drawn, weights, asked, judge, metrics, batch_size, cache, device)
    ordered = {name: numbers[name] for name in metrics if name in numbers}
    if not ordered:
        raise VarpiError(f"{judge.name} has nothing to compute {', '.join(metrics)} from")
    return {"metrics": ordered, "warnings": warnings, "seconds": round(time.perf_counter() - begun, 2)}


def _see_captions(
    drawn: Path, weights: Weights, asked: Subject, judge: Judge, batch_size: int, device: str
) -> dict[str, float]:
    tokens, tokenizer = load_file(drawn / TOKENS)["tokens"], _pair(weights, device).tokenizer
    images = (image for part in tokens.split(batch_size) for image in decoded(tokenizer, part))
    return _geneval(images, _scenes(asked.data, asked.split), judge, device)


def _see_classes(
    drawn: Path,
    weights: Weights,
    asked: Subject,
    judge: Judge,
    metrics: Sequence[str],
    batch_size: int,
    cache: Path,
    device: str,
) -> tuple[dict[str, float], list[str]]:
    extractor, reference = _judge(judge, device), _reference(asked.data, asked.split)
    samples = DrawnImages(drawn / TOKENS, _pair(weights, device).tokenizer, weights.tokenizer_sha256, asked)
    numbers: dict[str, float] = {}
    warnings: list[str] = []
    if names := _of_distribution(metrics, extractor):
        result = evaluate_distribution(
            samples,
            reference,
            extractor=extractor,
            metrics=[MEASURES[name] for name in names],
            batch_size=batch_size,
            cache=cache,
            device=device,
        )
        assert result is not None
        in_order = sorted(names, key=lambda name: [*METRICS].index(MEASURES[name]))
        numbers = dict(zip(in_order, result.metrics.values(), strict=True))
        warnings = list(result.warnings)
    store = FeatureStore.of(cache, samples, extractor)
    classes = samples.classes
    if AGREEMENT in metrics and judge.name in JUDGES and extractor.streams["logits"] == asked.classes:
        store.extract(extractor, batch_size=batch_size, workers=0, share=(0, 1), progress=False)
        seen = torch.from_numpy(store.vectors("logits")).argmax(dim=1)
        numbers[AGREEMENT] = (seen == classes).double().mean().item()
    shutil.rmtree(store.folder, ignore_errors=True)
    return numbers, warnings


def _of_distribution(metrics: Sequence[str], extractor: Network) -> list[str]:
    return [name for name in metrics if name in MEASURES and METRICS[MEASURES[name]] in extractor.streams]


def check_measures(asked: Subject, count: int, judge: Judge, metrics: Sequence[str], device: str) -> None:
    """Raise VarpiError where a judge could not measure so many samples beside a split."""
    extractor, side = _judge(judge, device), asked.data.image_size
    if names := [MEASURES[name] for name in _of_distribution(metrics, extractor)]:
        samples = Announced(f"{count} samples", count, side, {})
        check_distribution(samples, _reference(asked.data, asked.split), extractor=extractor, metrics=names)


def see_scenes(folder: Path, asked: Subject, count: int, judge: Judge, device: str) -> dict[str, Any]:
    """What GenEval's rules make of the real scenes of the captions: `metrics`, the judge's own faults."""
    scenes = _scenes(asked.data, asked.split)
    images = (render_scene(scenes.scene(i), asked.data.image_size) for i in range(count))
    return {"sha256": scenes.fingerprint, "count": count, "metrics": _geneval(images, scenes, judge, device)}


def _geneval(images: Iterable[np.ndarray], scenes: CaptionedShapes, judge: Judge, device: str) -> dict[str, float]:
    """The share of images (H,W,3), uint8, one for each caption, that are right, by task, and the tasks' mean."""
    detector = ShapesDetector(judge.weights, device=device)
    colorist, right = ShapesColorist(detector), defaultdict[str, list[bool]](list)
    for i, image in enumerate(images):
        picture, metadata = Image.fromarray(image), scenes.geneval_metadata(i)
        boxes, masks = detector(picture)
        colors = {name: colorist(picture, name, boxes[name], masks[name]) for name in boxes}
        right[metadata["tag"]].append(judge_geneval(boxes, metadata, colors)[0])
    tasks = {task: statistics.fmean(right[task]) for task in GENEVAL_TASKS if right[task]}
    return {"overall": statistics.fmean(tasks.values()), **tasks}


class DrawnImages(SampleSet):
    """The images of drawn tokens, decoded as they are read."""

    def __init__(self, path: Path, tokenizer: Tokenizer, tokenizer_sha256: str, asked: Subject) -> None:
        self.source = str(path)
        self.tokens = load_file(path)["tokens"]
        self.count = len(self.tokens)
        self.classes = torch.tensor(asked.first(self.count))
        self.height = self.width = asked.data.image_size
        self.sampling = {"classes": self.classes.tolist()}
        self._tokenizer = tokenizer
        # With the split, for whoever measures beside it deletes the features that it made
        self._key = f"tokens {path} {sha256_of(path)} {tokenizer_sha256} beside {asked.split}"

    @property
    def key(self) -> str:
        return self._key

    def _arrays(self, ranges: Sequence[range]) -> Iterator[np.ndarray]:
        for images in ranges:
            yield decoded(self._tokenizer, self.tokens[images.start : images.stop])


@torch.inference_mode()
def decoded(tokenizer: Any, tokens: Tensor) -> np.ndarray:
    """Tokens (n,N) as pixels, uint8 (n,H,W,3)."""
    device = next(iter(tokenizer.parameters())).device
    return to_uint8(tokenizer.decode(tokens.long().to(device)))


def _identify(model: Path) -> dict[str, str]:
    """What a run has trained, "generator" or "tokenizer", and the sha256 of its tensors.

    Of the tensors alone: the file also holds the recipe, and that names the folder of the weights it began with.
    """
    digest = hashlib.sha256()
    with safe_open(model, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        kind = json.loads((file.metadata() or {})["varpi"])["kind"]
    return {"part": kind, "sha256": digest.hexdigest()}


def identify_judge(judge: Judge) -> dict[str, Any]:
    """What a judge is, with `weights_sha256`."""
    if judge.name != SHAPES_DETECTOR:
        return dict(_loaded(judge.name, judge.weights, judge.precision, "cpu").identity)
    identity = ShapesDetector(judge.weights).identity
    return {"name": judge.name, "weights_sha256": identity["sha256"], "floor": identity["floor"], **GENEVAL_SETTINGS}


def _scenes(data: StudyData, split: str) -> CaptionedShapes:
    return CaptionedShapes(split=split, image_size=data.image_size)


@lru_cache(maxsize=1)
def _pair(weights: Weights, device: str) -> Pair:
    return open_pair(weights.generator, tokenizer=weights.tokenizer, device=device)


def _judge(judge: Judge, device: str) -> Network:
    return _loaded(judge.name, judge.weights, judge.precision, device)


def _reference(data: StudyData, split: str) -> Reference:
    return _opened(data.source, split, data.image_size, data.image_column, data.label_column)


@lru_cache(maxsize=4)
def _loaded(name: str, weights: str | None, precision: str, device: str) -> Network:
    return load_extractor(name, weights=weights, precision=precision, device=device)


@lru_cache(maxsize=2)
def _opened(source: str, split: str, image_size: int, image_column: str, label_column: str) -> Reference:
    return open_reference(
        source, split=split, image_size=image_size, image_column=image_column, label_column=label_column
    )
