"""How close a set of samples is to real images: FID, sFID, Inception Score, precision, recall, KID.

Images stream through the network once, into a `FeatureStore`. An evaluation that is stopped goes on where it was and
ends with the same numbers to the bit, several processes share the work, and a network sees a reference only once.
"""

import difflib
import json
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from varpi.errors import VarpiError
from varpi.evaluation.distances import inception_score, kernel_distance, precision_recall
from varpi.evaluation.feature_store import FeatureStore
from varpi.evaluation.reference import Reference
from varpi.evaluation.result import Result
from varpi.evaluation.statistics import Moments, frechet
from varpi.networks.extractors import FeatureExtractor
from varpi.samples.reading import SampleSet

METRICS = {"fid": "pool", "sfid": "spatial", "is": "logits", "precision": "pool", "recall": "pool", "kid": "pool"}
"""What can be asked for, and the stream that it is computed on."""
_FRECHET = ("fid", "sfid")
_OTHER_NAMES = {"fid": "frechet_distance", "kid": "kernel_distance", "is": "inception_score"}


class Processes(Protocol):
    """Of `varpi.runtime.processes.World`, what an evaluation needs."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


@dataclass(frozen=True)
class DistributionSettings:
    """What moves a number besides the images and the network; the same for two evaluations that are compared."""

    inception_score_splits: int = 10
    """Consecutive parts of the samples; their mean is reported. ADM: parts of 5000, which is 10 of 50 000."""
    neighbors: int = 3
    """k of precision and recall."""
    max_reference_for_pr: int = 10_000
    """Of a larger reference, precision and recall use that many images at even distances. ADM: 10 000."""
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    distance_dtype: str = "float64"
    """"float64" or "float32": of the distances behind precision and recall."""

    def __post_init__(self) -> None:
        for name in ("inception_score_splits", "neighbors", "max_reference_for_pr", "kid_subsets"):
            if getattr(self, name) < 1:
                raise VarpiError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.kid_subset_size < 2:
            raise VarpiError(f"kid_subset_size is {self.kid_subset_size}; it must be at least 2")
        if self.distance_dtype not in ("float64", "float32"):
            raise VarpiError(f"distance_dtype is {self.distance_dtype!r}; it must be float64 or float32")


def evaluate_distribution(
    samples: SampleSet,
    reference: Reference | None,
    *,
    extractor: FeatureExtractor,
    metrics: Collection[str] | None = None,
    settings: DistributionSettings | None = None,
    batch_size: int = 64,
    workers: int = 0,
    cache: Path | None = None,
    world: Processes | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> Result | None:
    """Measure samples against a reference; None on all processes but the first.

    The metrics are those of the ADM evaluator (Dhariwal and Nichol 2021) and KID. In the result they are called fid,
    sfid, inception_score (of the samples alone), precision, recall and kid on Inception. Elsewhere the Fréchet and the
    kernel distance are fd_dinov2 and kd_dinov2, or frechet_distance and kernel_distance.

    Args:
        samples: from `open_samples`.
        reference: from `open_reference`; None for the Inception Score alone.
        extractor: from `load_extractor`, or anything else that follows the protocol.
        metrics: of `METRICS`; each is computed or refused. None: all that the network has features for, and where
            counts or the reference do not allow one, a warning in the result instead. Empty: a record of the samples.
        batch_size: images in the network at once. Another one changes the numbers by rounding only.
        workers: processes that decode image files.
        cache: directory for the features, 20 kB an image on Inception. What lies there is used again while the set's
            files keep their names, sizes and times, and the network its identity. None: a temporary one.
        world: the processes that share the work, each with this same call; they need a `cache` that all of them see.
        device: where distances between vectors are computed.
        progress: show a bar on stderr.

    Processes meet nowhere: the first waits for the files of the others, for an hour each at most.

    The sha256 of samples and reference in the result is that of the pixels which the features were computed from; an
    `.npz` with statistics is known by that of the file.

    Raises:
        VarpiError: an unknown metric, or one that these samples, this reference or this network do not allow; samples
            and reference of different sizes; images that cannot be read or that change meanwhile; features that are not
            finite.
    """
    settings = settings or DistributionSettings()
    if batch_size < 1:
        raise VarpiError(f"batch_size is {batch_size}; it must be at least 1")
    rank, size = (world.rank, world.size) if world is not None else (0, 1)
    if size > 1 and cache is None:
        raise VarpiError("an evaluation by several processes needs a cache directory that all of them see: give cache")
    job = _Job(samples, reference, extractor, settings)
    chosen, warnings = job.choose(metrics)
    seen = [samples, *([reference.images] if reference is not None and reference.images and job.sees(chosen) else [])]
    with nullcontext(cache) if cache is not None else tempfile.TemporaryDirectory(prefix="varpi-") as folder:
        stores = [FeatureStore.of(Path(folder), images, extractor) for images in seen]
        for store in stores:
            store.extract(extractor, batch_size=batch_size, workers=workers, share=(rank, size), progress=progress)
        if rank != 0:
            return None
        for store in stores:
            store.wait()
        return job.measure(chosen, warnings, stores[0], stores[1] if len(stores) > 1 else None, device)


def check_distribution(
    samples: SampleSet,
    reference: Reference | None,
    *,
    extractor: FeatureExtractor,
    metrics: Collection[str] | None = None,
    settings: DistributionSettings | None = None,
) -> None:
    """Raise what `evaluate_distribution` would raise of these arguments, before there are samples to look at.

    samples: perhaps `Announced`. The network is shown a black image of their size.
    """
    _Job(samples, reference, extractor, settings or DistributionSettings()).choose(metrics)
    extractor(torch.zeros(1, 3, samples.height, samples.width, dtype=torch.uint8))


@dataclass(frozen=True)
class _Job:
    samples: SampleSet
    reference: Reference | None
    extractor: FeatureExtractor
    settings: DistributionSettings

    @property
    def stored(self) -> Mapping[str, Moments]:
        """The reference's own statistics, if they are of this network."""
        return self.reference.statistics if self.reference is not None and self.extractor.name == "inception" else {}

    def choose(self, metrics: Collection[str] | None) -> tuple[list[str], list[str]]:
        """The metrics to compute, in the order of `METRICS`, and warnings about those that are not."""
        for name in metrics if metrics is not None else ():
            if name not in METRICS:
                near = difflib.get_close_matches(name.lower(), [*METRICS], 1, 0.4)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise VarpiError(f"no metric {name!r}: there are {', '.join(METRICS)}{hint}")
        self._check_sides()
        streams = self.extractor.streams
        wanted = [name for name in METRICS if (METRICS[name] in streams if metrics is None else name in metrics)]
        reasons = {name: reason for name in wanted if (reason := self._obstacle(name)) is not None}
        if reasons and (metrics is not None or len(reasons) == len(wanted)):
            name, reason = next(iter(reasons.items()))
            raise VarpiError(f"{name} cannot be computed: {reason}")
        left_out = [f"{name} is left out: {reason}" for name, reason in reasons.items()]
        return [name for name in wanted if name not in reasons], left_out

    def sees(self, chosen: Collection[str]) -> bool:
        """Whether the reference's images have to go through the network."""
        return any(name != "is" and not (name in _FRECHET and METRICS[name] in self.stored) for name in chosen)

    def measure(
        self,
        chosen: Sequence[str],
        warnings: Sequence[str],
        samples: FeatureStore,
        reference: FeatureStore | None,
        device: str,
    ) -> Result:
        settings = self.settings
        numbers: dict[str, float] = {}
        details: dict[str, Any] = {}
        for name in _FRECHET:
            if name in chosen:
                numbers[self._name(name)] = frechet(
                    samples.moments(METRICS[name]), self._moments(METRICS[name], reference)
                )
        if "is" in chosen:
            logits = samples.vectors(METRICS["is"])
            numbers[self._name("is")] = inception_score(logits, settings.inception_score_splits)
        if reference is not None and {"precision", "recall", "kid"} & set(chosen):
            made = samples.vectors("pool")
            if {"precision", "recall"} & set(chosen):
                both = precision_recall(
                    reference.vectors("pool", settings.max_reference_for_pr),
                    made,
                    settings.neighbors,
                    device=device,
                    dtype=getattr(torch, settings.distance_dtype),
                )
                numbers |= {name: x for name, x in zip(("precision", "recall"), both, strict=True) if name in chosen}
            if "kid" in chosen:
                mean, spread = kernel_distance(
                    made,
                    reference.vectors("pool"),
                    subsets=settings.kid_subsets,
                    subset_size=settings.kid_subset_size,
                    device=device,
                )
                numbers[self._name("kid")] = mean
                details[f"{self._name('kid')}_deviation"] = spread
        return Result(
            kind="distribution",
            metrics=numbers,
            samples=_describe(self.samples, samples.sha256()),
            sampling=_without_lists(self.samples.sampling),
            reference=self._describe_reference(chosen, reference),
            evaluator={"extractor": dict(self.extractor.identity), **vars(settings), "device": device},
            warnings=[*self._warnings(chosen), *warnings],
            details=details,
        )

    def _name(self, metric: str) -> str:
        if self.extractor.name == "dinov2" and metric in ("fid", "kid"):
            return {"fid": "fd_dinov2", "kid": "kd_dinov2"}[metric]
        if self.extractor.name == "inception" and metric != "is":
            return metric
        return _OTHER_NAMES.get(metric, metric)

    def _moments(self, stream: str, reference: FeatureStore | None) -> Moments:
        if stream in self.stored:
            return self.stored[stream]
        assert reference is not None
        return reference.moments(stream)

    def _check_sides(self) -> None:
        """Refuse a reference that no metric could use."""
        if self.reference is None:
            return
        images, samples = self.reference.images, self.samples
        if images is not None and (images.height, images.width) != (samples.height, samples.width):
            raise VarpiError(
                f"{self.reference.source}: its images are {images.width}x{images.height} and those of {samples.source} "
                f"{samples.width}x{samples.height}; measure against a reference of the samples' size"
            )
        for stream, stored in self.stored.items():
            width = self.extractor.streams.get(stream)
            if width != stored.width:
                raise VarpiError(
                    f"{self.reference.source}: its statistics are of {stored.width} features, and "
                    f"{self.extractor.name} ({stream}) has {width}; they are another network's"
                )

    def _obstacle(self, metric: str) -> str | None:
        """Why a metric cannot be computed."""
        stream, settings, reference = METRICS[metric], self.settings, self.reference
        if stream not in self.extractor.streams:
            return f"the extractor {self.extractor.name} gives no {stream!r}, only {', '.join(self.extractor.streams)}"
        needed, what = {
            "is": (settings.inception_score_splits, "one for each split (inception_score_splits)"),
            "precision": (settings.neighbors + 1, "more than its neighbors"),
            "recall": (settings.neighbors + 1, "more than its neighbors"),
            "kid": (settings.kid_subset_size, "as many as a subset has (kid_subset_size)"),
        }.get(metric, (2, "a covariance"))
        sides = [("samples", self.samples.source, self.samples.count)]
        if metric != "is":
            if reference is None:
                return "there is no reference"
            if not (metric in _FRECHET and stream in self.stored):
                if reference.images is None:
                    return f"{reference.source} holds {self._what_is_stored()} and no images (arr_0), which it needs"
                count = reference.images.count
                if metric in ("precision", "recall"):
                    count = min(count, settings.max_reference_for_pr)
                sides.append(("reference images", reference.source, count))
        for side, source, count in sides:
            if count < needed:
                return f"{source} has {count} {side}, and at least {needed} are needed: {what}"
        return None

    def _what_is_stored(self) -> str:
        assert self.reference is not None
        if not self.stored:
            return "statistics of Inception"
        return "statistics" if "spatial" in self.stored else "mu and sigma"

    def _warnings(self, chosen: Sequence[str]) -> list[str]:
        """What a reader of the numbers should know, for what is in them."""
        warnings = list(self.extractor.warnings)
        samples, images = self.samples, self.reference.images if self.reference is not None else None
        for metric in _FRECHET:
            if metric not in chosen:
                continue
            stream = METRICS[metric]
            sides = [("samples", samples.count)]
            if stream not in self.stored and images is not None:
                sides.append(("reference images", images.count))
            width = self.extractor.streams[stream]
            warnings += [
                f"{count:,} {side} for {width:,} features: {self._name(metric)} is biased upwards; published ones use "
                "50,000"
                for side, count in sides
                if count <= width
            ]
        if self.extractor.name == "inception":
            if samples.count != 50_000:
                warnings.append(f"{samples.count:,} samples; published ImageNet numbers use 50,000")
            if images is not None and images.count != 10_000 and {"precision", "recall"} & set(chosen):
                warnings.append(
                    f"{images.count:,} reference images; published precision and recall use ADM's batch of 10,000"
                )
            if (samples.height, samples.width) != (256, 256):
                warnings.append(
                    f"images of {samples.width}x{samples.height} pixels; the paper resizes to 256x256 first "
                    "(from 384: varpi sample --resize 256)"
                )
        if self.reference is not None and images is None:
            warnings.append(f"{self.reference.source} does not tell the size of the images behind its statistics")
        classes = (samples.sampling or {}).get("classes")
        if isinstance(classes, list):
            counts = Counter(classes).values()
            if max(counts) > min(counts):
                warnings.append(
                    f"unbalanced classes: {min(counts):,} to {max(counts):,} samples each; compare with sets drawn "
                    "alike"
                )
        return warnings

    def _describe_reference(self, chosen: Sequence[str], seen: FeatureStore | None) -> dict[str, Any] | None:
        reference = self.reference
        if reference is None or set(chosen) <= {"is"}:
            return None
        sha256 = reference.file_sha256 or (seen.sha256() if seen is not None else None)
        statistics = {
            name: "stored in the file" if METRICS[name] in self.stored else "computed from its images"
            for name in _FRECHET
            if name in chosen
        }
        described = _describe(reference.images, sha256) if reference.images is not None else {"sha256": sha256}
        column = {} if reference.image_column is None else {"image_column": reference.image_column}
        return {**described, "source": reference.source, **column, "statistics": statistics}


def _describe(images: SampleSet, sha256: str | None) -> dict[str, Any]:
    size = [images.height, images.width]
    return {"source": images.source, "sha256": sha256, "count": images.count, "image_size": size}


def _without_lists(sampling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The record of a sampling without an entry for each image, but with how many different ones there were."""
    if sampling is None:
        return None
    record = dict(sampling)
    for name in ("classes", "prompts"):
        if isinstance(record.get(name), list):
            record[name] = {"count": len(record[name]), "different": len(set(map(json.dumps, record[name])))}
    return record
