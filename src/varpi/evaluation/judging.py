"""What `varpi evaluate` does: find out what it was given, make samples where there are none, and call the evaluator."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from varpi.data import open_dataset
from varpi.data.digits import digit_in
from varpi.data.opening import open_split
from varpi.errors import VarpiError
from varpi.evaluation.alignment import evaluate_alignment
from varpi.evaluation.distribution import Settings, evaluate_distribution
from varpi.evaluation.reference import open_reference
from varpi.evaluation.result import Result
from varpi.methods.rewards import Reward, load_reward_network
from varpi.networks.digits import embed, load_judge
from varpi.networks.loading import load_extractor
from varpi.recipe import Recipe
from varpi.samples.reading import SampleSet, open_samples
from varpi.sampling.settings import Sampling

AGREEMENT = "class_agreement"


def is_run(path: Path) -> bool:
    """Whether a directory holds a training run with a model."""
    return (path / "recipe.yaml").is_file() and (path / "model.safetensors").is_file()


def samples_folder(run: Path, settings: Mapping[str, Any]) -> Path:
    """Where a run's samples of these settings lie; other settings have another folder."""
    model = (run / "model.safetensors").stat()
    key = json.dumps([settings, model.st_size, model.st_mtime_ns], sort_keys=True, default=str)
    return run / "samples" / hashlib.sha256(key.encode()).hexdigest()[:12]


def judge_distribution(
    source: Path,
    *,
    features: str,
    reference: str | None,
    reference_split: str | None,
    metrics: Sequence[str] | None,
    settings: Settings,
    weights: str | None,
    precision: str,
    batch_size: int,
    workers: int,
    cache: Path | None,
    device: str,
    world: Any,
    progress: bool,
) -> Result | None:
    """Distances of a set of images to a reference; on the digits also what the judge sees. None but on rank 0."""
    samples = open_samples(source)
    wanted = None if metrics is None else [name for name in metrics if name != AGREEMENT]
    if metrics is not None and AGREEMENT in metrics and features != "digits":
        raise VarpiError(f"{AGREEMENT} is what the judge of digits sees; it needs --features digits")
    if reference is None and features == "digits":
        reference = "digits"
    if reference is None and wanted != ["is"]:
        raise VarpiError("--reference is missing: an ADM .npz, a folder of images, or a dataset with --reference-split")
    opened = None
    if reference is not None:
        opened = open_reference(reference, split=reference_split, image_size=samples.height)
    result = evaluate_distribution(
        samples,
        opened,
        extractor=load_extractor(features, weights=weights, device=device, precision=precision),
        metrics=wanted,
        settings=settings,
        batch_size=batch_size,
        workers=workers,
        cache=cache,
        world=world,
        device=device,
        progress=progress,
    )
    if result is None or features != "digits" or (metrics is not None and AGREEMENT not in metrics):
        return result
    asked = digits_asked(samples.sampling)
    if asked is None:
        if metrics is not None:
            raise VarpiError(f"{source}: no sample.json tells which digits were asked for; {AGREEMENT} needs them")
        return result
    agreement, by_class = class_agreement(samples, asked, batch_size)
    return dataclasses.replace(
        result,
        metrics={**result.metrics, AGREEMENT: agreement},
        details={**result.details, AGREEMENT: by_class},
    )


def digits_asked(record: Mapping[str, Any] | None) -> list[int] | None:
    """The digit that each sample was to show, by class or by the word in its prompt; None where that is not known."""
    if record is None:
        return None
    if "classes" in record:
        return record["classes"]
    named = [digit_in(prompt) for prompt in record.get("prompts", [])]
    return [digit for digit in named if digit is not None] if named and None not in named else None


def class_agreement(samples: SampleSet, asked: Sequence[int], batch_size: int) -> tuple[float, dict[str, float]]:
    """The share of samples in which the judge sees the digit asked for: of all, and by digit."""
    judge = load_judge()
    parts = [range(start, min(start + batch_size, samples.count)) for start in range(0, samples.count, batch_size)]
    seen = torch.cat([embed(judge, batch.images.float() / 127.5 - 1)[1] for batch in samples.batches(parts)])
    right = (seen == torch.tensor(asked)).double()
    by_class = {str(digit): right[torch.tensor(asked) == digit].mean().item() for digit in sorted(set(asked))}
    return right.mean().item(), by_class


def judge_alignment(
    generator: Any,
    tokenizer: Any,
    recipe: Recipe | None,
    *,
    about: Mapping[str, Any],
    data: str | None,
    split: str,
    features: str,
    weights: str | None,
    images: int | None,
    batch_size: int,
    sampling: Sampling,
    device: str,
    progress: bool,
) -> Result:
    """Alignment on the held-out images of `data`, or of the run's own source; reward and β are the run's.

    about: what the result says of the generator.
    """
    side = generator.grid * tokenizer.downsample
    if data is not None:
        dataset = open_dataset(data, image_size=side, split=split)
    elif recipe is not None:
        dataset = open_split(recipe.data, split)
    else:
        raise VarpiError("--data is missing: the held-out images to measure alignment on")
    chosen: dict[str, Any] = {"perceptual_weight": 0.0}
    perceptual = None
    settings = {} if recipe is None else dict(recipe.method)
    reward = settings.get("reward")
    if isinstance(reward, Reward):
        chosen = {"mse_weight": reward.mse_weight, "perceptual_weight": reward.perceptual_weight}
        perceptual = load_reward_network(reward, device)
    chosen |= {name: settings[name] for name in ("prior_weight", "context_noise") if name in settings}
    result = evaluate_alignment(
        generator,
        tokenizer,
        dataset,
        extractor=load_extractor(features, weights=weights, device=device),
        perceptual=perceptual,
        images=images,
        batch_size=batch_size,
        sampling=sampling,
        progress=progress,
        **chosen,
    )
    return dataclasses.replace(result, sampling={**about, **(result.sampling or {})})


def world_of(device: str | None) -> Any:
    """The processes that torchrun started for an evaluation; None for a single one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from varpi.runtime.processes import join_world

    return join_world(device)
