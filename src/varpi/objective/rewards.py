"""Pixel-space reward of sampled token sequences (VA-π Eq. 10): decode them and compare with the image.

B images, G samples per image, N tokens per image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from varpi.errors import VarpiError


class Perceptual(Protocol):
    """A distance between images that is a distance between their maps."""

    def maps(self, images: Tensor) -> list[Tensor]:
        """A network's maps of images (n,3,H,W) in [-1,1], one tensor (n,C,h,w) per layer."""
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
    """float32 (B,G): minus the weighted sum of the parts; higher is better."""
    parts: dict[str, Tensor]
    """"mse", "perceptual", "l1": the unweighted distances, each float32 (B,G); only those of weight > 0."""


@torch.no_grad()
def score_samples(
    decode: Callable[[Tensor], Tensor],
    samples: Tensor,
    images: Tensor,
    weights: RewardWeights,
    *,
    perceptual: Perceptual | None = None,
    chunk: int = 8,
) -> Rewards:
    """Decode each sample and score it against its image.

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

    Returns:
        Rewards.

    Raises:
        VarpiError: chunk below 1, a perceptual weight without a perceptual distance, decoded images of another size.
    """
    if chunk < 1:
        raise VarpiError(f"score_samples: chunk is {chunk}; it must be >= 1")
    if weights.perceptual > 0 and perceptual is None:
        raise VarpiError(f"reward weight perceptual is {weights.perceptual}, but no perceptual distance was given")
    batch, group_size, _ = samples.shape
    if images.shape[0] != batch:
        raise VarpiError(f"score_samples: samples of {batch} images, but {images.shape[0]} images")

    active = {name: weight for name, weight in vars(weights).items() if weight > 0}
    parts = {name: torch.empty(batch, group_size, device=images.device) for name in active}
    images_at_once = max(1, chunk // group_size)
    for first in range(0, batch, images_at_once):
        rows = slice(first, first + images_at_once)
        targets = images[rows].float()
        target_maps = perceptual.maps(targets) if perceptual is not None and weights.perceptual > 0 else None
        # Whole groups when they fit in a chunk, otherwise one image's group in several pieces.
        for start in range(0, group_size, chunk):
            columns = slice(start, start + chunk)
            piece = samples[rows, columns]
            decoded = decode(piece.flatten(0, 1)).float()
            if decoded.shape[1:] != images.shape[1:]:
                raise VarpiError(
                    f"score_samples: decoded images are {tuple(decoded.shape[1:])} but the targets are "
                    f"{tuple(images.shape[1:])}; the image size must fit the token grid"
                )
            error = decoded.unflatten(0, piece.shape[:2]) - targets.unsqueeze(1)
            if "mse" in active:
                parts["mse"][rows, columns] = error.square().mean(dim=(2, 3, 4))
            if "l1" in active:
                parts["l1"][rows, columns] = error.abs().mean(dim=(2, 3, 4))
            if perceptual is not None and target_maps is not None:
                distance = perceptual.distance(perceptual.maps(decoded), target_maps)
                parts["perceptual"][rows, columns] = distance.unflatten(0, piece.shape[:2])

    total = torch.zeros(batch, group_size, device=images.device)
    for name, weight in active.items():
        total -= weight * parts[name]
    return Rewards(total, parts)
