"""How well images match their prompts: CLIP's cosine and the human preference score HPS v2, as AR-GRPO reports them.

Both are cosines between the features of an image and of its prompt, in [-1, 1], not scaled; larger is better. Networks
compute in float32 on every device (the original of HPS under autocast, in half precision).

Shapes: N images of H x W pixels, B of them at once.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from varpi.data.prompts import read_prompts
from varpi.errors import VarpiError
from varpi.evaluation.geneval import digest_of, prompt_folders, sampling_settings
from varpi.evaluation.result import Result
from varpi.networks.clip import CLIP_B32, ClipScorer
from varpi.networks.foreign import ClipArchitecture
from varpi.networks.hps import HpsScorer
from varpi.samples.reading import SampleSet, contents_sha256, image_files, open_samples

SCORES = ("clip", "hps")


Scorer = ClipScorer | HpsScorer


def clip_scores(
    images: np.ndarray,
    prompts: Sequence[str],
    *,
    source: str | Path = CLIP_B32,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
) -> np.ndarray:
    """The CLIP score of each image, uint8 (N,H,W,3), with its prompt: float32 (N,). See `ClipScorer`.

    Raises VarpiError for another number of prompts, other arrays, and as `ClipScorer` does.
    """
    return _scores(images, prompts, ClipScorer(source, device=device), batch_size)


def hps_scores(
    images: np.ndarray,
    prompts: Sequence[str],
    *,
    weights: str | Path | None = None,
    version: str = "v2.1",
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    architecture: ClipArchitecture = "ViT-H-14",
) -> np.ndarray:
    """The HPS of each image, uint8 (N,H,W,3), with its prompt: float32 (N,). See `HpsScorer`.

    Raises VarpiError for another number of prompts, other arrays, and as `HpsScorer` does.
    """
    scorer = HpsScorer(weights, version=version, device=device, architecture=architecture)
    return _scores(images, prompts, scorer, batch_size)


def evaluate_text(
    source: str | Path,
    prompts: Sequence[str] | None = None,
    *,
    metrics: Sequence[str] = SCORES,
    clip_source: str | Path = CLIP_B32,
    hps_weights: str | Path | None = None,
    hps_version: str = "v2.1",
    hps_architecture: ClipArchitecture = "ViT-H-14",
    scorers: Sequence[Scorer] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    progress: bool = False,
) -> Result:
    """Score a set of images against their prompts: the mean over images of each metric, and its standard error.

    source: a set of images as `open_samples` takes it.
    prompts: one for each image, in their order; by default those of sample.json (`varpi sample`), or of the
        metadata.jsonl beside each image of a folder in GenEval's layout.
    metrics, clip_source, hps_weights, hps_version, hps_architecture: of the scorers, see `load_scorers`.
    scorers: those to use, where they are loaded already.
    progress: show a bar on stderr.

    The standard error takes images for independent; several of one prompt are less so. The result's details hold the
    means by prompt and the score of each image.

    Raises VarpiError for another number of prompts than images, prompts that nobody recorded, unknown metrics, and as
    `open_samples`, `ClipScorer` and `HpsScorer` do.
    """
    _check_metrics(metrics)
    samples = open_samples(source)
    texts = _recorded_prompts(Path(source).expanduser(), samples) if prompts is None else list(prompts)
    _check_count(texts, samples.count, str(source))
    if scorers is None:
        scorers = load_scorers(
            metrics,
            clip_source=clip_source,
            hps_weights=hps_weights,
            hps_version=hps_version,
            hps_architecture=hps_architecture,
            device=device,
        )
    values, sha256 = _score_set(samples, texts, scorers, batch_size, progress)
    means: dict[str, float] = {}
    for name, scores in values.items():
        means[name] = float(scores.mean())
        if len(scores) > 1:
            means[f"{name}_standard_error"] = float(scores.std(ddof=1)) / math.sqrt(len(scores))
    return Result(
        kind="text",
        metrics=means,
        samples={
            "source": samples.source,
            "sha256": sha256,
            "count": samples.count,
            "image_size": [samples.height, samples.width],
        },
        sampling=sampling_settings(samples.sampling),
        reference={"source": samples.source, "sha256": digest_of(texts), "count": len(set(texts))},
        evaluator={
            **{scorer.name: dict(scorer.identity) for scorer in scorers},
            "source": {scorer.name: scorer.source for scorer in scorers},
        },
        details={
            "prompts": _by_prompt(texts, values),
            "images": {name: scores.tolist() for name, scores in values.items()},
        },
    )


def load_scorers(
    metrics: Sequence[str] = SCORES,
    *,
    clip_source: str | Path = CLIP_B32,
    hps_weights: str | Path | None = None,
    hps_version: str = "v2.1",
    hps_architecture: ClipArchitecture = "ViT-H-14",
    device: torch.device | str = "cpu",
) -> list[Scorer]:
    """What computes `metrics`: "clip" (metric clip_score), "hps" (metric hps_v2.1 or hps_v2.0, by `hps_version`).

    Raises VarpiError for unknown metrics, and as `ClipScorer` and `HpsScorer` do.
    """
    _check_metrics(metrics)
    scorers: list[Scorer] = []
    if "clip" in metrics:
        scorers.append(ClipScorer(clip_source, device=device))
    if "hps" in metrics:
        scorers.append(HpsScorer(hps_weights, version=hps_version, device=device, architecture=hps_architecture))
    return scorers


def _check_metrics(metrics: Sequence[str]) -> None:
    if unknown := [metric for metric in metrics if metric not in SCORES]:
        raise VarpiError(f"there is no text metric {unknown[0]!r}; there are {', '.join(SCORES)}")
    if not metrics:
        raise VarpiError(f"no text metric was asked for; there are {', '.join(SCORES)}")


def _score_set(
    samples: SampleSet, prompts: Sequence[str], scorers: Sequence[Scorer], batch_size: int, progress: bool
) -> tuple[dict[str, np.ndarray], str]:
    """The scores of every image by metric, float64 (N,), and what the set is known by."""
    starts = range(0, samples.count, _checked_size(batch_size))
    ranges = [range(start, min(start + batch_size, samples.count)) for start in starts]
    parts: dict[str, list[Tensor]] = {scorer.name: [] for scorer in scorers}
    digests: list[np.ndarray] = []
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        batches = bar.track(samples.batches(ranges), total=len(ranges), description="scoring images")
        for images, batch in zip(ranges, batches, strict=True):
            digests.append(batch.digests)
            for scorer in scorers:
                parts[scorer.name].append(scorer(batch.images, prompts[images.start : images.stop]))
    values = {name: torch.cat(part).double().numpy() for name, part in parts.items()}
    return values, contents_sha256(samples.height, samples.width, digests)


def _scores(images: np.ndarray, prompts: Sequence[str], scorer: Scorer, batch_size: int) -> np.ndarray:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise VarpiError(f"expected images uint8 of shape (N, H, W, 3), got {images.dtype} {images.shape}")
    _check_count(prompts, len(images), "images")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    starts = range(0, len(images), _checked_size(batch_size))
    return torch.cat([scorer(pixels[i : i + batch_size], prompts[i : i + batch_size]) for i in starts]).numpy()


def _checked_size(batch_size: int) -> int:
    if batch_size < 1:
        raise VarpiError(f"batch_size is {batch_size}; it must be at least 1")
    return batch_size


def _check_count(prompts: Sequence[str], images: int, where: str) -> None:
    if isinstance(prompts, str) or len(prompts) != images or not images:
        count = 1 if isinstance(prompts, str) else len(prompts)
        raise VarpiError(
            f"{where}: {images} images and {count} prompts; give one prompt for each image, in their order"
        )


def _recorded_prompts(root: Path, samples: SampleSet) -> list[str]:
    """The prompt of each image of a set, as far as it says."""
    record = samples.sampling or {}
    if "prompts" in record:
        return list(record["prompts"])
    folders = prompt_folders(root)
    if not folders:
        made = "sample.json names classes, not prompts" if "classes" in record else "nothing there says of what prompts"
        raise VarpiError(f"{root}: {made}; give the prompts, one for each image")
    prompts = {}
    for folder in folders:
        found = read_prompts(folder / "metadata.jsonl")
        if len(found) != 1:
            raise VarpiError(f"{folder / 'metadata.jsonl'}: holds {len(found)} prompts; a folder has one")
        prompts[folder] = found[0]
    files = image_files(root)
    if strays := [file for file in files if file.parent.parent not in prompts]:
        raise VarpiError(
            f"{strays[0]}: lies in no prompt folder; GenEval's layout has 00000/samples/0000.png and so on"
        )
    return [prompts[file.parent.parent] for file in files]


def _by_prompt(prompts: Sequence[str], values: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The mean scores of each prompt, in order of first appearance."""
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(i)
    return [
        {"prompt": prompt, "images": len(own), **{name: float(scores[own].mean()) for name, scores in values.items()}}
        for prompt, own in places.items()
    ]
