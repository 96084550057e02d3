"""Where sets of images lie in the space of a network's features: as densities and as a map of single images.

Shapes: N images a set, D features. A set is one kind of image (real ones, those of a model); the first one is real.
Fig. 1b and 1c of arXiv 2512.19680 are of these two kinds.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from varpi.errors import VarpiError
from varpi.report.drawing import DASHES, LINE, MARKS, SERIES, Panel, draw

CELLS = 160
"""Cells on a side of the grid that densities are computed on."""
ENCLOSED = (0.3, 0.6, 0.9)
"""Shares of a set that its contours enclose."""
LAYERS = 8
SIZE = (4.6, 3.6)
AXES = (0.09, 0.11, 0.89, 0.87)


class Embeddings(NamedTuple):
    """Features of sets of images: {name: (N,D)}, two to six sets, real images first; and whose features they are."""

    sets: Mapping[str, np.ndarray]
    features: str


def embedding_density(sets: Mapping[str, np.ndarray]) -> Panel:
    """Contours of each set's density over the first two principal components of the first set, the real images.

    sets: name -> vectors (N,D), at most six. A contour bounds the smallest region that holds a share of its set (30, 60
    and 90 %); a mark stands at the mean. All sets are smoothed by one Gaussian kernel: Scott's rule, for the spread
    of the real images and the size of the smallest set, so that none looks smoother for being smaller.

    Raises VarpiError for vectors of the wrong shape, not finite, or real ones that do not differ.
    """
    vectors = _checked(sets)
    real_name, real = next(iter(vectors.items()))
    axes_of, shares = _principal_axes(real, 2)
    points = {name: (values - real.mean(axis=0)) @ axes_of for name, values in vectors.items()}
    bandwidth = points[real_name].std(axis=0, ddof=1) * min(map(len, points.values())) ** (-1 / 6)
    if not (bandwidth > 0).all():
        raise VarpiError(
            f"report: the vectors of {real_name} lie on a line or a point; they have no density in a plane"
        )
    ends = [np.percentile(xy, q, axis=0) for xy in points.values() for q in (0.1, 99.9)]
    low, high = np.min(ends, axis=0) - 3 * bandwidth, np.max(ends, axis=0) + 3 * bandwidth

    densities = [kernel_density(xy, bandwidth, low, high) for xy in points.values()]
    levels = [_levels(density) for _, _, density in densities]
    x, y, _ = densities[0]
    inside = np.any([density >= min(h) for (_, _, density), h in zip(densities, levels, strict=True)], axis=0)
    left_right, bottom_top = _view(x[inside.any(axis=1)], y[inside.any(axis=0)], AXES)

    def paint(figure: Figure) -> None:
        axes = figure.add_axes(AXES)
        for i, xy in enumerate(points.values()):
            density = densities[i][2].T
            if i == 0:
                axes.contourf(x, y, density, levels=[*levels[0], density.max() * 2], colors=SERIES[0], alpha=0.1)
            style = (0, DASHES[i]) if DASHES[i] else "-"
            axes.contour(x, y, density, levels=levels[i], colors=SERIES[i], linewidths=LINE * 0.7, linestyles=[style])
            axes.plot(*xy.mean(axis=0), marker=MARKS[i], color=SERIES[i], markersize=8, linestyle="none")
        axes.set(xlim=left_right, ylim=bottom_top, xticks=[], yticks=[])
        axes.set_xlabel(f"component 1 ({shares[0]:.0%} of the variance)")
        axes.set_ylabel(f"component 2 ({shares[1]:.0%})")

    return Panel(
        "Density",
        f"Over the two principal components of {real_name}. Contours enclose 30, 60 and 90 % of each set, marks are "
        "means; one bandwidth for all.",
        draw("density", f"Density of features in two principal components: {', '.join(sets)}", SIZE, paint),
    )


def embedding_map(sets: Mapping[str, np.ndarray], points: int = 400) -> Panel:
    """Single images of all sets on one t-SNE map (van der Maaten & Hinton 2008), by scikit-learn.

    sets: name -> vectors (N,D), at most six; of larger ones `points` vectors are drawn, by a fixed seed and at the same
    places in sets of one size. Vectors of more than 50 features are first reduced to their 50 principal components.

    Raises VarpiError as `embedding_density` does, for points < 10, or without scikit-learn.
    """
    if points < 10:
        raise VarpiError(f"report: a map of {points} points a set shows nothing; give at least 10")
    vectors = {name: _some(values, points) for name, values in _checked(sets).items()}
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise VarpiError("the map of embeddings needs scikit-learn: pip install 'varpi[evaluation]'") from error
    everything = np.concatenate(list(vectors.values()))
    if everything.shape[1] > 50:
        everything = (everything - everything.mean(axis=0)) @ _principal_axes(everything, 50)[0]
    perplexity = min(30.0, (len(everything) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(everything)
    ends = np.cumsum([len(values) for values in vectors.values()])[:-1]
    shown = " and ".join(str(n) for n in sorted({len(values) for values in vectors.values()}))

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
        for layer in range(LAYERS):  # by turns, so that no set lies on top of all others
            for i, xy in enumerate(np.split(places, ends)):
                face = SERIES[i] if i else "none"
                colors = {"markerfacecolor": face, "markeredgecolor": SERIES[i], "markeredgewidth": 0.7, "alpha": 0.75}
                axes.plot(*xy[layer::LAYERS].T, marker=MARKS[i], markersize=3.5, linestyle="none", **colors)
        axes.set(xticks=[], yticks=[])

    return Panel(
        "Map",
        f"t-SNE of {shown} images a set, perplexity {perplexity:.0f}. Near means alike; distances between groups, and "
        "their sizes, mean little.",
        draw("map", f"t-SNE map of features: {', '.join(sets)}", SIZE, paint),
    )


def kernel_density(
    points: np.ndarray, bandwidth: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Density of `points` (N,2), smoothed by a Gaussian of standard deviations `bandwidth` (2,).

    Computed from counts on CELLS x CELLS cells between `low` and `high` (2,): a point counts at its cell's centre, one
    outside not at all. Returns the centres along both axes and the density at them (CELLS,CELLS), x first.
    """
    edges = np.linspace(low, high, CELLS + 1).T
    counts, _, _ = np.histogram2d(*points.T, bins=(edges[0], edges[1]))
    x, y = (edges[:, 1:] + edges[:, :-1]) / 2
    spread_x, spread_y = (
        np.exp(-(((centres[:, None] - centres) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
        for centres, width in zip((x, y), bandwidth, strict=True)
    )
    return x, y, spread_x @ counts @ spread_y / len(points)


def _levels(density: np.ndarray) -> list[float]:
    """Heights whose contours enclose `ENCLOSED`, in increasing order."""
    heights = np.sort(density, axis=None)[::-1]
    held = np.cumsum(heights) / heights.sum()
    return np.unique(heights[np.searchsorted(held, ENCLOSED)]).tolist()


def _view(x: np.ndarray, y: np.ndarray, axes: tuple[float, float, float, float]) -> np.ndarray:
    """Limits (2,2) of both axes, of one scale, that show the places `x` and `y` with a margin on `axes` of a figure."""
    low, high = np.array([x.min(), y.min()]), np.array([x.max(), y.max()])
    inches = np.array(axes[2:]) * SIZE
    half = 0.55 * ((high - low) / inches).max() * inches
    return np.stack([(low + high) / 2 - half, (low + high) / 2 + half], axis=1)


def _principal_axes(vectors: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Directions (D,count) of largest variance, largest first, and the share of the variance along each."""
    variances, directions = np.linalg.eigh(np.cov(vectors, rowvar=False))
    chosen = directions[:, ::-1][:, :count]
    largest = chosen[np.abs(chosen).argmax(axis=0), np.arange(chosen.shape[1])]
    return chosen * np.sign(largest), variances[::-1][:count] / max(variances.sum(), np.finfo(float).tiny)


def _some(values: np.ndarray, count: int) -> np.ndarray:
    chosen = np.random.default_rng(0).permutation(len(values))[:count]
    return values[np.sort(chosen)]


def _checked(sets: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if not 2 <= len(sets) <= len(SERIES):
        raise VarpiError(
            f"report: embeddings of {len(sets)} sets; 2 to {len(SERIES)} can be compared, real images first"
        )
    checked = {name: np.asarray(values, dtype=np.float64) for name, values in sets.items()}
    width = next(iter(checked.values())).shape[-1:]
    for name, values in checked.items():
        if values.ndim != 2 or values.shape[1:] != width or len(values) < 10 or values.shape[1] < 2:
            raise VarpiError(
                f"report: the embeddings of {name} have shape {values.shape}; expected (N, D), N at least 10, D at "
                "least 2 and the same for all sets"
            )
        if not np.isfinite(values).all():
            raise VarpiError(f"report: the embeddings of {name} hold values that are not finite")
    return checked
