"""Means and covariances of features, gathered part by part in float64, and the Fréchet distance between two of them.

Shapes: N vectors of D features.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np

from varpi.errors import VarpiError


@dataclass(frozen=True)
class Moments:
    """The Gaussian that is fitted to a set of vectors."""

    count: int | None
    """N; None where a file of statistics does not tell."""
    mean: np.ndarray
    """float64 (D,)."""
    covariance: np.ndarray
    """float64 (D,D), unbiased; all zeros for a single vector."""

    @property
    def width(self) -> int:
        return len(self.mean)


def moments(features: np.ndarray) -> Moments:
    """The moments of vectors (N,D), N >= 1, summed in float64 about their own mean."""
    values = features.astype(np.float64)
    mean = values.mean(axis=0)
    values -= mean
    return Moments(len(values), mean, values.T @ values / max(len(values) - 1, 1))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two sets together (Chan, Golub and LeVeque 1979), without the cancellation of sums of squares.

    Raises VarpiError for unknown counts or different widths.
    """
    if a.count is None or b.count is None:
        raise VarpiError("statistics of an unknown number of vectors cannot be merged")
    _check_widths(a, b)
    total = a.count + b.count
    shift = b.mean - a.mean
    scatter = a.covariance * (a.count - 1) + b.covariance * (b.count - 1)
    scatter += np.outer(shift, shift) * (a.count * b.count / total)
    return Moments(total, a.mean + shift * (b.count / total), scatter / (total - 1))


def moments_of_parts(parts: Iterable[np.ndarray]) -> Moments:
    """The moments of vectors that come in parts (n,D), at least one, of which only one is held at a time."""
    return reduce(merge_moments, map(moments, parts))


def frechet(a: Moments, b: Moments) -> float:
    """Fréchet distance between two Gaussians; 0 for equal ones (Heusel et al. 2017, Eq. 6).

    |mean_a - mean_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)). With C_a = R R^T the trace of the root is the sum of the
    roots of the eigenvalues of R^T C_b R, a symmetric matrix: the same number as by `sqrtm`, without its imaginary
    residue and its breakdown when a covariance is singular.

    Raises VarpiError for different widths.
    """
    _check_widths(a, b)
    difference = a.mean - b.mean
    values, vectors = np.linalg.eigh(a.covariance)
    root = vectors * np.sqrt(values.clip(min=0))
    eigenvalues = np.linalg.eigvalsh(root.T @ b.covariance @ root)
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    distance = difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_of_root
    return max(float(distance), 0.0)  # equal Gaussians leave a rounding error of either sign


def _check_widths(a: Moments, b: Moments) -> None:
    if a.width != b.width:
        raise VarpiError(
            f"one side has {a.width} features and the other {b.width}; take both from the same network and layer"
        )
