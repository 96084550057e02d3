"""Pixel-space reward of sampled token sequences (VA-π Eq. 10): decode them and compare with the image.

B images, G samples per image, N tokens per image.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from varpi.errors import VarpiError


class Perceptual(Protocol):
    """A distance between images that is a distance between their maps."""

    def maps(self, images: Tensor) -> list[Tensor]:
        """A network's maps of images (n,3,H,W) in [-1,1], one tensor (n,C,h,w) per layer."""
        ...

    def error_maps(self, maps: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor]:
        """float32 [(n,h,w)], a map for each layer, whose spatial means add up to `distance`."""
        ...

    def distance(self, maps: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """Distances float32 (n,) from n images to m references, n a multiple of m.

        Each reference serves n/m consecutive images: the G samples of one target, without copies of its maps.
        """
        ...


@dataclass(frozen=True)
class RewardWeights:
    """How much each distance counts. A distance of weight 0 is not computed."""

    mse: float = 1.0
    """Weight of the mean squared error over channels and pixels, on the [-1,1] scale."""
    perceptual: float = 1.0
    """Weight of the perceptual distance (the paper's λ)."""
    l1: float = 0.0
    """Weight of the mean absolute error over channels and pixels, on the [-1,1] scale."""

    def __post_init__(self) -> None:
        weights = {"mse": self.mse, "perceptual": self.perceptual, "l1": self.l1}
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise VarpiError(f"reward weight {name} is {weight}; it must be a number >= 0")
        if not any(weights.values()):
            raise VarpiError("every reward weight is 0; at least one of mse, perceptual, l1 must be > 0")


@dataclass(frozen=True)
class Rewards:
    """Rewards of a batch of groups."""

    total: Tensor
    """float32 (B,G): minus the weighted sum of the distances, or the energy score; higher is better."""
    parts: dict[str, Tensor]
    """"mse", "perceptual", "l1": the unweighted distances, each float32 (B,G); only those of weight > 0. With the
    energy score also "spread", from a sample to the others of its image."""
    maps: Tensor | None = None
    """float32 (B,G,N), where asked for: the total's share of each token's place in the grid."""


@torch.no_grad()
def score_samples(
    decode: Callable[[Tensor], Tensor],
    samples: Tensor,
    images: Tensor,
    weights: RewardWeights,
    *,
    perceptual: Perceptual | None = None,
    chunk: int = 8,
    local: bool = False,
    energy: bool = False,
) -> Rewards:
    """Decode each sample and score it against its image.

    By Eq. 10: minus the weighted distances. That is best for a generator that always draws the mean of what the image
    could be, a smooth one. `energy` takes the energy score instead (Gneiting and Raftery 2007, Eq. 21), by which, of
    all distributions of whole images, the true one is best:

        -r(sample, image) + mean over the image's other samples of r(sample, other),  r: root of the weighted distances

    A chunk of sequences is decoded, scored and dropped before the next, so memory does not grow with B or G. An image's
    own perceptual maps are computed once and serve its G samples. Decoded images are not clamped, as in the
    released code: clamping would hide how far out of range a decode is.

    Args:
        decode: tokens int64 (M,N) -> images (M,3,H,W), nominally in [-1,1].
        samples: int64 (B,G,N).
        images: (B,3,H,W) in [-1,1], the targets, on the samples' device.
        weights: weights of the distances.
        perceptual: the perceptual distance; never called when its weight is 0.
        chunk: the largest number of sequences decoded at once, >= 1.
        local: also give the rewards' maps: the errors at every pixel, and at every place of each perceptual layer,
            brought to the grid of tokens by area (a coarser layer counts for all the tokens that a place covers).
        energy: the energy score, which has no maps, and wants a chunk of G at least.

    Returns:
        Rewards.

    Raises:
        VarpiError: chunk below 1, a perceptual weight without a perceptual distance, decoded images of another size.
    """
    batch, group_size, num_tokens = samples.shape
    together = group_size if energy else None
    named = _checked(batch, images, weights, perceptual, chunk, together)
    parts = {name: torch.empty(batch, group_size, device=images.device) for name in named}
    maps = torch.zeros(batch, group_size, num_tokens, device=images.device) if local else None
    for rows, columns, target in _pieces(images, group_size, weights, perceptual, chunk):
        piece = samples[rows, columns]
        found, errors = _errors(
            decode(piece.flatten(0, 1)), target, weights, perceptual, local=local, group_size=together
        )
        for name, values in found.items():
            parts[name][rows, columns] = values.unflatten(0, piece.shape[:2])
        if maps is not None:
            on_grid = torch.stack([_to_grid(error, math.isqrt(num_tokens)) for error in errors]).sum(dim=0)
            maps[rows, columns] = -on_grid.unflatten(0, piece.shape[:2])
    return Rewards(_total(parts, weights), parts, maps)


def score_codes(
    decode: Callable[[Tensor], Tensor],
    codes: Tensor,
    images: Tensor,
    weights: RewardWeights,
    *,
    perceptual: Perceptual | None = None,
    chunk: int = 8,
    energy: bool = False,
) -> tuple[Rewards, Tensor]:
    """As `score_samples`, from the code vectors that tokens stand for, with the error's gradient at each of them.

    Args:
        decode: codes (M,C,h,w) -> images (M,3,H,W), nominally in [-1,1], differentiable.
        codes: (B,G,C,h,w).
        images, weights, perceptual, chunk, energy: as for `score_samples`.

    Returns:
        Rewards, and float32 (B,G,N,C): the gradient of each sample's error, minus its reward, N = h w row-major. With
        `energy` it is that of the group's mean reward, in which the distance of two samples counts once, times G.

    Raises:
        VarpiError: as `score_samples`.
    """
    batch, group_size, width, *grid = codes.shape
    together = group_size if energy else None
    named = _checked(batch, images, weights, perceptual, chunk, together)
    parts = {name: torch.empty(batch, group_size, device=images.device) for name in named}
    gradients = torch.empty(batch, group_size, math.prod(grid), width, device=images.device)
    for rows, columns, target in _pieces(images, group_size, weights, perceptual, chunk):
        with torch.enable_grad():
            piece = codes[rows, columns].detach().requires_grad_()
            found, _ = _errors(
                decode(piece.flatten(0, 1)), target, weights, perceptual, local=False, group_size=together
            )
            # Samples do not mix, so the gradient of their sum holds each one's own; the distance of two is in it twice.
            (gradient,) = torch.autograd.grad(-_total(found, weights, of_spread=0.5).sum(), piece)
        gradients[rows, columns] = gradient.float().flatten(3).transpose(2, 3)
        for name, values in found.items():
            parts[name][rows, columns] = values.detach().unflatten(0, piece.shape[:2])
    return Rewards(_total(parts, weights), parts), gradients


class _Target(NamedTuple):
    """Images (b,3,H,W) to compare with, and their perceptual maps, computed once."""

    images: Tensor
    maps: Sequence[Tensor] | None


def _checked(
    batch: int,
    images: Tensor,
    weights: RewardWeights,
    perceptual: Perceptual | None,
    chunk: int,
    group_size: int | None,
) -> list[str]:
    """The names of the parts. group_size: with the energy score."""
    if group_size is not None and not 2 <= group_size <= chunk:
        raise VarpiError(
            f"score_samples: the energy score compares an image's samples, which are decoded together: {group_size} "
            f"must be at least 2 and at most the chunk, {chunk}"
        )
    if chunk < 1:
        raise VarpiError(f"score_samples: chunk is {chunk}; it must be >= 1")
    if weights.perceptual > 0 and perceptual is None:
        raise VarpiError(f"reward weight perceptual is {weights.perceptual}, but no perceptual distance was given")
    if images.shape[0] != batch:
        raise VarpiError(f"score_samples: samples of {batch} images, but {images.shape[0]} images")
    active = [name for name, weight in vars(weights).items() if weight > 0]
    return active if group_size is None else [*active, "spread"]


def _pieces(
    images: Tensor, group_size: int, weights: RewardWeights, perceptual: Perceptual | None, chunk: int
) -> Iterator[tuple[slice, slice, _Target]]:
    """Which images and which of their samples go together: whole groups when they fit in a chunk, or parts of one."""
    images_at_once = max(1, chunk // group_size)
    for first in range(0, len(images), images_at_once):
        rows = slice(first, first + images_at_once)
        targets, maps = images[rows].float(), None
        if perceptual is not None and weights.perceptual > 0:
            maps = perceptual.maps(targets)
        for start in range(0, group_size, chunk):
            yield rows, slice(start, start + chunk), _Target(targets, maps)


def _errors(
    decoded: Tensor,
    target: _Target,
    weights: RewardWeights,
    perceptual: Perceptual | None,
    *,
    local: bool,
    group_size: int | None = None,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Distances (n,) of decoded images (n,3,H,W) to targets, by name; and with `local` weighted maps (n,h,w).

    group_size: also the mean root of the distance to the others of each group of so many.
    """
    decoded = decoded.float()
    if decoded.shape[1:] != target.images.shape[1:]:
        raise VarpiError(
            f"score_samples: decoded images are {tuple(decoded.shape[1:])} but the targets are "
            f"{tuple(target.images.shape[1:])}; the image size must fit the token grid"
        )
    error = (decoded.unflatten(0, (len(target.images), -1)) - target.images.unsqueeze(1)).flatten(0, 1)
    seen = None if perceptual is None or target.maps is None else perceptual.maps(decoded)
    parts, errors = _distances(error, seen, target.maps, weights, perceptual), []
    if local:
        errors = [weights.mse * error.square().mean(dim=1), weights.l1 * error.abs().mean(dim=1)]
        if perceptual is not None and seen is not None and target.maps is not None:
            errors += [weights.perceptual * layer for layer in perceptual.error_maps(seen, target.maps)]
    if group_size is not None:
        parts["spread"] = _spread(decoded, seen, group_size, weights, perceptual)
    return parts, errors


def _distances(
    error: Tensor,
    maps: Sequence[Tensor] | None,
    others: Sequence[Tensor] | None,
    weights: RewardWeights,
    perceptual: Perceptual | None,
) -> dict[str, Tensor]:
    """Those of weight > 0, (n,) by name, from differences (n,3,H,W) and both sides' perceptual maps."""
    found = {}
    if weights.mse > 0:
        found["mse"] = error.square().mean(dim=(1, 2, 3))
    if weights.l1 > 0:
        found["l1"] = error.abs().mean(dim=(1, 2, 3))
    if perceptual is not None and maps is not None and others is not None:
        found["perceptual"] = perceptual.distance(maps, others)
    return found


def _spread(
    decoded: Tensor,
    maps: Sequence[Tensor] | None,
    group_size: int,
    weights: RewardWeights,
    perceptual: Perceptual | None,
) -> Tensor:
    """The mean root of the distances of decoded images (n,3,H,W) to the others of their group: (n,)."""

    def turned(values: Tensor, by: int) -> Tensor:
        return values.unflatten(0, (-1, group_size)).roll(by, 1).flatten(0, 1)

    spread = torch.zeros(len(decoded), device=decoded.device)
    for by in range(1, group_size // 2 + 1):
        others = None if maps is None else [turned(layer, by) for layer in maps]
        found = _distances(decoded - turned(decoded, by), maps, others, weights, perceptual)
        root = _root(_weighted(found, weights))
        spread = spread + root
        if 2 * by != group_size:  # else each pair has been met from both sides
            spread = spread + turned(root, -by)
    return spread / (group_size - 1)


def _weighted(parts: Mapping[str, Tensor], weights: RewardWeights) -> Tensor:
    distance = sum(weight * parts[name] for name, weight in vars(weights).items() if weight > 0)
    assert isinstance(distance, Tensor)
    return distance


def _root(distance: Tensor) -> Tensor:
    """Of a distance that may be 0, where the root has no gradient: there it is taken as 0."""
    return torch.where(distance > 0, distance, 1.0).sqrt() * (distance > 0)


def _total(parts: Mapping[str, Tensor], weights: RewardWeights, of_spread: float = 1.0) -> Tensor:
    distance = _weighted(parts, weights)
    return -distance if "spread" not in parts else of_spread * parts["spread"] - _root(distance)


def _to_grid(errors: Tensor, side: int) -> Tensor:
    """(n,h,w) to (n, side²), by area, row-major."""
    return functional.adaptive_avg_pool2d(errors, side).flatten(1)
