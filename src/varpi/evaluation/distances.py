"""Distances between two sets of feature vectors, and the Inception Score: float64, as in the ADM evaluator.

Shapes: N vectors of D features, K classes.
"""

import numpy as np
import torch

from varpi.errors import VarpiError

Features = np.ndarray | torch.Tensor

BLOCK = 2048  # rows of a distance matrix held at once: 2048 x 50 000 float64 is 0.8 GB


def frechet_distance(a: Features, b: Features) -> float:
    """Fréchet distance between Gaussians fitted to `a` (N,D) and `b` (M,D); 0 for equal mean and covariance.

    |mean_a - mean_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) with unbiased covariances (Heusel et al. 2017, Eq. 6).
    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), a symmetric matrix:
    the same number as by `sqrtm`, without its imaginary residue and its breakdown when a covariance is singular.

    Raises VarpiError for fewer than two vectors, non-finite ones, or different numbers of features.
    """
    first, second = _pair(a, b, "first", "second", at_least=2)
    difference = first.mean(axis=0) - second.mean(axis=0)
    covariance_a, covariance_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (first, second))
    values, vectors = np.linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root_a @ covariance_b @ root_a)
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    distance = difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * trace_of_root
    return max(float(distance), 0.0)  # equal sets leave a rounding error of either sign


def precision_recall(reference: Features, samples: Features, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), both in [0, 1].

    Each vector spans a ball that reaches to its k-th nearest neighbour in its own set. Precision is the share of
    `samples` (M,D) inside some ball of `reference` (N,D), recall that of `reference` inside some ball of `samples`.

    Raises VarpiError for k < 1, for k vectors or fewer, non-finite ones, or different numbers of features.
    """
    if k < 1:
        raise VarpiError(f"precision_recall: k is {k}; it must be >= 1")
    real, made = _pair(reference, samples, "reference", "samples", at_least=k + 1)
    centre = real.mean(axis=0)  # distances do not change, but their rounding errors shrink
    real, made = real - centre, made - centre
    return _share_inside(made, real, _radii(real, k)), _share_inside(real, made, _radii(made, k))


def inception_score(logits: Features, splits: int = 10) -> float:
    """Inception Score (Salimans et al. 2016) of classifier `logits` (N,K): in [1, K].

    exp of the mean KL divergence from each prediction to the mean prediction, averaged over `splits` consecutive parts
    of (nearly) equal size. Raises VarpiError for fewer logits than splits or non-finite ones.
    """
    if splits < 1:
        raise VarpiError(f"inception_score: splits is {splits}; it must be >= 1")
    values = _checked(logits, "logits", at_least=splits)
    values = values - values.max(axis=1, keepdims=True)
    log_probabilities = values - np.log(np.exp(values).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(log_probabilities, splits):
        probabilities = np.exp(part)
        # A class that no prediction reaches (underflow) contributes 0 · log 0 = 0.
        log_marginal = np.log(np.maximum(probabilities.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp((probabilities * (part - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Squared distance (N,) from each point to its k-th nearest neighbour, itself not counted."""
    blocks = (_squared_distances(points[i : i + BLOCK], points) for i in range(0, len(points), BLOCK))
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in blocks])


def _share_inside(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    blocks = (_squared_distances(points[i : i + BLOCK], centres) for i in range(0, len(points), BLOCK))
    return sum(int((block <= radii).any(axis=1).sum()) for block in blocks) / len(points)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1)[None] - 2 * (a @ b.T)
    return np.maximum(squares, 0)


def _pair(a: Features, b: Features, name_a: str, name_b: str, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    checked_a, checked_b = _checked(a, name_a, at_least), _checked(b, name_b, at_least)
    if checked_a.shape[1] != checked_b.shape[1]:
        raise VarpiError(
            f"the {name_a} features have {checked_a.shape[1]} dimensions and the {name_b} {checked_b.shape[1]}; "
            "take both from the same network"
        )
    return checked_a, checked_b


def _checked(features: Features, name: str, at_least: int) -> np.ndarray:
    array = features.detach().cpu().double().numpy() if isinstance(features, torch.Tensor) else np.asarray(features)
    if array.ndim != 2 or array.shape[1] == 0:
        raise VarpiError(f"{name}: expected one feature vector per image, shape (N, D), got {array.shape}")
    if len(array) < at_least:
        raise VarpiError(f"{name}: {len(array)} vectors are too few, at least {at_least} are needed")
    array = array.astype(np.float64)
    bad = int((~np.isfinite(array)).any(axis=1).sum())
    if bad:
        raise VarpiError(
            f"{name}: {bad} of {len(array)} vectors hold NaN or infinity; the model that made them diverged"
        )
    return array
