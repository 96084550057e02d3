"""Distances between two sets of feature vectors, and the Inception Score: float64, as in the ADM evaluator.

Shapes: N vectors of D features, K classes.
"""

import numpy as np
import torch
from torch import Tensor

from varpi.errors import VarpiError
from varpi.evaluation.statistics import frechet, moments

Features = np.ndarray | Tensor

BLOCK = 2048  # rows of a distance matrix held at once: 2048 x 50 000 float64 is 0.8 GB


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance between Gaussians fitted to `a` (N,D) and `b` (M,D); 0 for equal mean and covariance.

    See `statistics.frechet`, which takes the fitted Gaussians. Raises VarpiError for fewer than two vectors, non-finite
    ones, or different numbers of features.
    """
    first, second = _pair(a, b, "first", "second", at_least=2)
    return frechet(moments(first), moments(second))


def kernel_distance(
    a: Features,
    b: Features,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
    device: str = "cpu",
) -> tuple[float, float]:
    """Kernel distance of `a` (N,D) and `b` (M,D), KID on Inception features (Bińkowski et al. 2018): mean and spread.

    The unbiased estimate of the squared maximum mean discrepancy under the kernel (x·y / D + 1)^3, on `subsets` random
    parts of `subset_size` vectors of either side, without replacement: their mean, and their standard deviation (not
    that of the mean). An unbiased estimate of nearly equal sets may be slightly negative. `seed` draws the parts that
    torch-fidelity draws, by numpy's frozen generator; float64 on `device`.

    Raises VarpiError for fewer vectors than a subset has, fewer than two in one, non-finite ones, or different numbers
    of features.
    """
    if subsets < 1:
        raise VarpiError(f"kernel_distance: subsets is {subsets}; it must be >= 1")
    if subset_size < 2:
        raise VarpiError(f"kernel_distance: subset_size is {subset_size}; it must be >= 2")
    first, second = _pair(a, b, "first", "second", at_least=subset_size)
    random = np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        x, y = (
            torch.from_numpy(side[random.choice(len(side), subset_size, replace=False)]).to(device, torch.float64)
            for side in (first, second)
        )
        pairs = subset_size * (subset_size - 1)
        within = sum((kernel.sum() - kernel.trace()).item() for kernel in (_kernel(x, x), _kernel(y, y)))
        estimates.append(within / pairs - 2 * _kernel(x, y).mean().item())
    return float(np.mean(estimates)), float(np.std(estimates))


def precision_recall(
    reference: Features,
    samples: Features,
    k: int = 3,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), both in [0, 1].

    Each vector spans a ball that reaches to its k-th nearest neighbour in its own set. Precision is the share of
    `samples` (M,D) inside some ball of `reference` (N,D), recall that of `reference` inside some ball of `samples`.

    device, dtype: where and in what the distances are computed. float32 is faster, on accelerators many times, and
    moves only vectors within rounding of the surface of a ball; the ADM evaluator multiplies in half precision.

    Raises VarpiError for k < 1, for k vectors or fewer, non-finite ones, or different numbers of features.
    """
    if k < 1:
        raise VarpiError(f"precision_recall: k is {k}; it must be >= 1")
    real, made = _pair(reference, samples, "reference", "samples", at_least=k + 1)
    centre = real.mean(axis=0, dtype=np.float64)  # distances do not change, but their rounding errors shrink
    real, made = (torch.from_numpy(side).to(device, dtype) for side in (real, made))
    shift = torch.from_numpy(centre).to(device, dtype)
    real, made = real - shift, made - shift
    real_radii, made_radii = _radii(real, k), _radii(made, k)
    made_inside, real_inside = 0, torch.zeros(len(real), dtype=torch.bool, device=device)
    for block, radii in zip(made.split(BLOCK), made_radii.split(BLOCK), strict=True):
        distances = _squared_distances(block, real)
        made_inside += int((distances <= real_radii).any(dim=1).sum())
        real_inside |= (distances <= radii[:, None]).any(dim=0)
    return made_inside / len(made), int(real_inside.sum()) / len(real)


def inception_score(logits: Features, splits: int = 10) -> float:
    """Inception Score (Salimans et al. 2016) of classifier `logits` (N,K): in [1, K].

    exp of the mean KL divergence from each prediction to the mean prediction, averaged over `splits` consecutive parts
    of (nearly) equal size. Raises VarpiError for fewer logits than splits or non-finite ones.
    """
    if splits < 1:
        raise VarpiError(f"inception_score: splits is {splits}; it must be >= 1")
    values = _checked(logits, "logits", at_least=splits)
    scores = []
    for part in np.array_split(values, splits):
        part = part.astype(np.float64)
        part -= part.max(axis=1, keepdims=True)
        part -= np.log(np.exp(part).sum(axis=1, keepdims=True))  # log-probabilities
        probabilities = np.exp(part)
        # A class that no prediction reaches (underflow) contributes 0 · log 0 = 0.
        log_marginal = np.log(np.maximum(probabilities.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp((probabilities * (part - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))


def _radii(points: Tensor, k: int) -> Tensor:
    """Squared distance (N,) from each point to its k-th nearest neighbour, itself not counted."""
    nearest = (_squared_distances(block, points).topk(k + 1, largest=False).values for block in points.split(BLOCK))
    return torch.cat([distances.amax(dim=1) for distances in nearest])


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = torch.addmm(b.square().sum(dim=1)[None], a, b.T, alpha=-2)
    return squares.add_(a.square().sum(dim=1)[:, None]).clamp_(min=0)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _pair(a: Features, b: Features, name_a: str, name_b: str, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    checked_a, checked_b = _checked(a, name_a, at_least), _checked(b, name_b, at_least)
    if checked_a.shape[1] != checked_b.shape[1]:
        raise VarpiError(
            f"the {name_a} features have {checked_a.shape[1]} dimensions and the {name_b} {checked_b.shape[1]}; "
            "take both from the same network"
        )
    return checked_a, checked_b


def _checked(features: Features, name: str, at_least: int) -> np.ndarray:
    """The vectors as an array of float32 or float64."""
    if isinstance(features, Tensor):
        features = features.detach().cpu()
        features = (features if features.dtype == torch.float32 else features.double()).numpy()
    array = np.asarray(features)
    if array.ndim != 2 or array.shape[1] == 0:
        raise VarpiError(f"{name}: expected one feature vector per image, shape (N, D), got {array.shape}")
    if len(array) < at_least:
        raise VarpiError(f"{name}: {len(array)} vectors are too few, at least {at_least} are needed")
    if array.dtype != np.float32:
        array = array.astype(np.float64)
    bad = int((~np.isfinite(array)).any(axis=1).sum())
    if bad:
        raise VarpiError(
            f"{name}: {bad} of {len(array)} vectors hold NaN or infinity; the model that made them diverged"
        )
    return np.ascontiguousarray(array)
