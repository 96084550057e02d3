"""Alignment itself: how far what VA-π trains on lies from what the generator then does alone.

The paper (arXiv 2512.19680, Eq. 7-10) argues with these quantities and tabulates none.

Shapes: B images, G samples per image, N tokens per image, V vocabulary, D features. *Real* tokens are what the
tokenizer encodes an image to. *Teacher-forced* samples are drawn at every position given those before it (Eq. 7);
*free-running* ones are generated token by token from the image's condition. Entropies and log-likelihoods are in nats
per token, pixels on the [-1,1] scale.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from varpi import objective
from varpi.data.caption_check import checked
from varpi.data.dataset import BadImage, Dataset, Dropped, Item
from varpi.data.left_out import LeftOut
from varpi.data.loader import collate_conditions
from varpi.data.pixels import to_uint8
from varpi.errors import VarpiError
from varpi.evaluation.distances import frechet_distance
from varpi.evaluation.result import Result
from varpi.generators import Generator
from varpi.networks.extractors import FeatureExtractor
from varpi.objective import Perceptual, RewardWeights
from varpi.runtime.randomness import Stream, permutation, uniforms
from varpi.sampling.generate import generate_with
from varpi.sampling.settings import Sampling
from varpi.tokenizers import Tokenizer
from varpi.weights.pair import check_pair

HELD = 64
"""Images that are generated together, and so the most that are held at once."""
QUANTITIES = (
    "reconstruction_reward",
    "prior_term",
    "lower_bound",
    "entropy_gap",
    "log_likelihood_gap",
    "teacher_free_distance",
    "round_trip_distance",
    "round_trip_changed",
)


def evaluate_alignment(
    generator: Generator,
    tokenizer: Tokenizer,
    dataset: Dataset,
    *,
    extractor: FeatureExtractor,
    perceptual: Perceptual | None = None,
    images: int | None = None,
    samples_per_image: int = 8,
    context_noise: float = 0.0,
    mse_weight: float = 1.0,
    perceptual_weight: float = 0.0,
    prior_weight: float = 0.1,
    sampling: Sampling | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> Result:
    """Measure a generator on held-out images and their conditions; in eval mode, where the generator lies.

    dataset: held-out data. Its images are taken in one fixed order, the same for every seed; unreadable ones and ones
        without a usable condition are left out and counted.
    extractor: whose "pool" features the Fréchet distance is of; none that a reward was trained with.
    perceptual: the reward's perceptual distance, on the generator's device; given just when its weight is positive.
    images: how many usable ones to measure, at least 2; None: all. More than there are is a warning.
    samples_per_image: G, teacher-forced samples that an image's reward is averaged over.
    context_noise: ξ in [0, 1], of the context behind the prior term and the teacher-forced samples (Eq. 28).
    mse_weight, perceptual_weight: of the reward; see `RewardWeights`.
    prior_weight: β >= 0 of the lower bound.
    sampling: how the free-running samples are made. All draws belong to its seed (0 unless given) and to an image's
        place among the measured ones.
    batch_size: images in one pass, which bounds the memory; above `HELD` it is `HELD`. Changes numbers by rounding
        only.
    progress: show a bar on stderr.

    Returns a Result of kind "alignment". Its metrics are means over images:

        reconstruction_reward: of G teacher-forced samples, decoded and scored against the image (Eq. 10).
        prior_term: cross-entropy of the real tokens under the noisy context (Eq. 9).
        lower_bound: reconstruction_reward - β prior_term: Eq. 8, its KL replaced by Eq. 9 and weighted by β.
        entropy_gap: entropy of the predictions along the free-running sample minus along the real tokens. Away from 0
            the generator is more or less certain on its own prefixes than on real ones (exposure bias).
        log_likelihood_gap: log-likelihood of the free-running sample minus that of the real tokens. Above 0 the
            generator finds its own samples likelier than real images.
        teacher_free_distance: Fréchet distance between decoded teacher-forced and decoded free-running samples, one of
            each per image. Biased upwards by small numbers, as every such distance: compare at equal `images`.
        round_trip_distance: mean squared difference between the decoded free-running sample and that image encoded and
            decoded once more, neither clamped nor quantized. Encoder and decoder nearly undo each other on images they
            know; a sequence on which they do not lies off the tokenizer's manifold.
        round_trip_changed: share of the free-running tokens that this encoding changes.

    Both gaps are of plain predictions from true prefixes: without context noise, guidance or temperature.

    Its details: `standard_errors` over images (of the gaps: of the paired differences); both sides of each gap, with
    suffix _real or _free, as means and, under `curves`, position by position; the round trip of the real tokens, the
    baseline, with suffix _real; `distances`, the reward's unweighted parts; `images`, how many were used or left out.

    Raises VarpiError for values out of range, fewer than 2 usable images, models and data that do not fit each other,
    and models whose outputs are not finite.
    """
    weights = RewardWeights(mse_weight, perceptual_weight)
    sampling = sampling or Sampling()
    seed = sampling.seed or 0
    sampling = replace(sampling, seed=seed)
    _check(images, samples_per_image, context_noise, prior_weight, batch_size)
    if (perceptual is not None) != (perceptual_weight > 0):
        given = "none was given" if perceptual is None else "a perceptual distance was given"
        raise VarpiError(f"perceptual_weight is {perceptual_weight}, but {given}: give both or neither")
    check_pair(generator, tokenizer)
    meter = _Meter(
        generator, tokenizer, extractor, perceptual, weights, samples_per_image, context_noise, seed, batch_size
    )
    items = _Items(checked(dataset, generator.caption_check), images)
    reference, free_tokens = hashlib.sha256(), hashlib.sha256()
    place = 0
    with (
        torch.no_grad(),
        _eval_mode(generator, tokenizer),
        Progress(console=Console(stderr=True), disable=not progress) as bar,
    ):
        task = bar.add_task("measuring", total=min(len(dataset), images or len(dataset)))
        for block in items.blocks():
            for item in block:
                _digest_item(reference, item)
            condition = generator.prepare_condition(collate_conditions([item.condition for item in block]))
            free = generate_with(generator, condition, sampling, first=place, batch_size=batch_size)
            free_tokens.update(free.cpu().numpy().tobytes())
            for start in range(0, len(block), batch_size):
                rows = slice(start, start + batch_size)
                pixels = torch.stack([item.image for item in block[rows]]).to(free.device)
                meter.add(pixels, condition[rows], free[rows], range(place, place + len(pixels)))
                place += len(pixels)
                bar.advance(task, len(pixels))
    if place < 2:
        raise VarpiError(
            f"{place} usable images ({items.left_out.line(len(dataset), 'images')}); the Fréchet distance needs at "
            "least 2"
        )

    values, details = meter.summary(prior_weight)
    teacher = torch.cat(meter.teacher_features)
    values["teacher_free_distance"] = frechet_distance(teacher, torch.cat(meter.free_features))
    warnings = list(extractor.warnings)
    if place <= teacher.shape[1]:
        warnings.append(
            f"teacher_free_distance: {place} images are too few for {teacher.shape[1]} features, and bias it upwards; "
            "compare it only with one of as many images"
        )
    if images is not None and place < images:
        warnings.append(f"{images} images were asked for, {place} are usable")
    if items.left_out:
        warnings.append(items.left_out.line(place + len(items.left_out), "images"))
    size = generator.grid * tokenizer.downsample
    return Result(
        kind="alignment",
        metrics={name: values.pop(name) for name in QUANTITIES},
        samples={"count": place, "image_size": size, "sha256": free_tokens.hexdigest()},
        sampling=asdict(sampling),
        reference={"count": place, "image_size": size, "sha256": reference.hexdigest()},
        evaluator={
            "extractor": dict(extractor.identity),
            "samples_per_image": samples_per_image,
            "context_noise": context_noise,
            "mse_weight": mse_weight,
            "perceptual_weight": perceptual_weight,
            "perceptual": None if perceptual is None else _network_identity(perceptual),
            "prior_weight": prior_weight,
        },
        warnings=warnings,
        details={**values, **details, "images": {"used": place, "left_out": items.left_out.found}},
    )


@dataclass
class _Items:
    """The usable items of a dataset, and what was left out."""

    dataset: Dataset
    most: int | None
    left_out: LeftOut = field(default_factory=LeftOut)

    def blocks(self) -> Iterator[list[Item]]:
        """At most `most` items, `HELD` at a time, in an order that mixes data sorted by class."""
        block: list[Item] = []
        left = len(self.dataset) if self.most is None else self.most
        for index in permutation(0, Stream.ALIGNMENT_ORDER, 0, len(self.dataset)):
            if not left:
                break
            try:
                block.append(self.dataset[int(index)])
            except (BadImage, Dropped) as error:
                self.left_out.note(error)
                continue
            left -= 1
            if len(block) == HELD:
                yield block
                block = []
        if block:
            yield block


@dataclass
class _Meter:
    """Measures batch by batch; keeps numbers by image, sums by position, and the features of both kinds of sample."""

    generator: Generator
    tokenizer: Tokenizer
    extractor: FeatureExtractor
    perceptual: Perceptual | None
    weights: RewardWeights
    group_size: int
    context_noise: float
    seed: int
    batch_size: int
    by_image: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    by_position: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    teacher_features: list[Tensor] = field(default_factory=list)
    free_features: list[Tensor] = field(default_factory=list)

    def add(self, images: Tensor, condition: Any, free: Tensor, places: range) -> None:
        """Measure images (B,3,H,W); free (B,N) was generated for their conditions."""
        targets = self.tokenizer.encode(images)
        logits = self.generator.logits(targets, condition)
        self._predictions("real", logits, targets)
        if self.context_noise > 0:
            draws = uniforms(self.seed, 0, places, (targets.shape[1], 2), stream=Stream.ALIGNMENT_NOISE)
            del logits  # the largest tensor here; never two of them
            context = objective.corrupt(targets, self.context_noise, self.generator.vocab_size, uniforms=draws)
            logits = self.generator.logits(context, condition)
        self._keep("prior_term", -objective.token_log_probs(logits, targets[:, None])[:, 0].double().mean(dim=1))
        draws = uniforms(self.seed, 0, places, (self.group_size, targets.shape[1]), stream=Stream.ALIGNMENT_SAMPLES)
        samples = objective.sample_tokens(logits, self.group_size, uniforms=draws)
        del logits
        rewards = objective.score_samples(
            self.tokenizer.decode, samples, images, self.weights, perceptual=self.perceptual, chunk=self.batch_size
        )
        self._keep("reconstruction_reward", rewards.total.double().mean(dim=1))
        for name, part in rewards.parts.items():
            self._keep(f"distance/{name}", part.double().mean(dim=1))
        self._predictions("free", self.generator.logits(free, condition), free)
        self._round_trip("_real", targets, self.tokenizer.decode(targets))
        decoded = self.tokenizer.decode(free)
        self._round_trip("", free, decoded)
        self.teacher_features.append(self._features(self.tokenizer.decode(samples[:, 0])))
        self.free_features.append(self._features(decoded))

    def summary(self, prior_weight: float) -> tuple[dict[str, float], dict[str, Any]]:
        """Means over images by name, and what else belongs into the details."""
        columns = {name: torch.cat(parts) for name, parts in self.by_image.items()}
        columns["lower_bound"] = columns["reconstruction_reward"] - prior_weight * columns["prior_term"]
        for name in ("entropy", "log_likelihood"):
            columns[f"{name}_gap"] = columns[f"{name}_free"] - columns[f"{name}_real"]
        count = len(columns["lower_bound"])
        means = {name: column.mean().item() for name, column in columns.items()}
        errors = {name: column.std().item() / math.sqrt(count) for name, column in columns.items()}
        details = {
            "distances": {name: means.pop(f"distance/{name}") for name, weight in vars(self.weights).items() if weight},
            "standard_errors": {name: error for name, error in errors.items() if name in means},
            "curves": {name: (torch.stack(sums).sum(0) / count).tolist() for name, sums in self.by_position.items()},
        }
        return means, details

    def _predictions(self, side: str, logits: Tensor, tokens: Tensor) -> None:
        """Entropy of softmax(logits) and log-likelihood of the tokens, each (B,N)."""
        entropy = [torch.special.entr(rows.softmax(dim=-1, dtype=torch.float32)).sum(dim=-1) for rows in logits]
        log_likelihood = objective.token_log_probs(logits, tokens[:, None])[:, 0]
        for name, values in (("entropy", torch.stack(entropy)), ("log_likelihood", log_likelihood)):
            values = values.double().cpu()
            self._keep(f"{name}_{side}", values.mean(dim=1))
            self.by_position[f"{name}_{side}"].append(values.sum(dim=0))

    def _round_trip(self, suffix: str, tokens: Tensor, decoded: Tensor) -> None:
        again = self.tokenizer.encode(decoded)
        difference = self.tokenizer.decode(again) - decoded
        self._keep(f"round_trip_distance{suffix}", difference.square().mean(dim=(1, 2, 3)))
        self._keep(f"round_trip_changed{suffix}", (again != tokens).double().mean(dim=1))

    def _features(self, decoded: Tensor) -> Tensor:
        pixels = torch.from_numpy(to_uint8(decoded)).permute(0, 3, 1, 2)
        return self.extractor(pixels)["pool"].cpu()

    def _keep(self, name: str, values: Tensor) -> None:
        self.by_image[name].append(values.double().cpu())


def _check(
    images: int | None, samples_per_image: int, context_noise: float, prior_weight: float, batch_size: int
) -> None:
    if images is not None and images < 2:
        raise VarpiError(f"images is {images}; the Fréchet distance needs at least 2")
    if samples_per_image < 1:
        raise VarpiError(f"samples_per_image is {samples_per_image}; it must be at least 1")
    if not 0 <= context_noise <= 1:
        raise VarpiError(f"context_noise is {context_noise}; it must be in [0, 1]")
    if not 0 <= prior_weight < math.inf:
        raise VarpiError(f"prior_weight is {prior_weight}; it must be at least 0 and finite")
    if batch_size < 1:
        raise VarpiError(f"batch_size is {batch_size}; it must be at least 1")


@contextmanager
def _eval_mode(*models: object) -> Iterator[None]:
    modules = [model for model in models if isinstance(model, nn.Module)]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def _digest_item(digest: Any, item: Item) -> None:
    digest.update(item.image.contiguous().numpy().tobytes())
    condition = item.condition
    features = isinstance(condition, Tensor)
    digest.update(condition.float().contiguous().numpy().tobytes() if features else str(condition).encode())


def _network_identity(network: object) -> dict[str, Any]:
    digest = hashlib.sha256()
    if isinstance(network, nn.Module):
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"network": type(network).__name__, "sha256": digest.hexdigest()}
