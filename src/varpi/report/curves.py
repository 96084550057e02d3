"""Learning curves as inline SVG: one small panel per metric, all on the same steps, in the page's own colours."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from varpi.errors import VarpiError
from varpi.report.drawing import DASHES, LINE, SERIES, Panel, draw

PANELS = {
    "reward_mean": ("Reward", "mean over all samples; higher is better"),
    "mse": ("Pixel error", "mean squared error of sampled against real image"),
    "perceptual": ("Perceptual distance", "of sampled against real image"),
    "reward_std": ("Reward spread", "standard deviation within a group of samples"),
    "policy_loss": ("Policy loss", "clipped surrogate, Eq. 11"),
    "cross_entropy": ("Cross-entropy", "of the true tokens, nats"),
    "validation_loss": ("Held-out loss", "cross-entropy of held-out tokens, nats"),
    "validation_reward": ("Held-out reward", "one sample of each held-out image; higher is better"),
    "entropy": ("Entropy", "of the predicted token, nats"),
    "clip_fraction": ("Clip fraction", "share of tokens whose ratio was clipped"),
    "approx_kl": ("Approximate KL", "from the policy that drew the samples"),
    "gradient_norm": ("Gradient norm", "before clipping"),
}
"""Metric -> (title, what it says). Other metrics of a log, such as timings, are not drawn."""


def curve_panels(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Panel]:
    """A panel for every metric of `PANELS` that some run has logged. curves: run name -> records that hold `step`.

    Raises VarpiError for more runs than there are line styles, or a record without a step.
    """
    if len(curves) > len(SERIES):
        raise VarpiError(f"report: curves of {len(curves)} runs; at most {len(SERIES)} can be told apart")
    for name, records in curves.items():
        missing = sum("step" not in record for record in records)
        if missing:
            raise VarpiError(f"report: {missing} of {len(records)} metrics records of {name} have no step")
    steps = [record["step"] for records in curves.values() for record in records]
    panels = []
    for metric, (title, note) in PANELS.items():
        lines = [(i, name, _points(records, metric)) for i, (name, records) in enumerate(curves.items())]
        lines = [line for line in lines if line[2].size]
        if lines:
            panels.append(Panel(title, note, _curves(metric, title, lines, (min(steps), max(steps)))))
    return panels


def _points(records: Sequence[Mapping[str, float]], metric: str) -> np.ndarray:
    """(n,2) of step and value; a value that is missing or not finite (a skipped update) is left out."""
    points = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
    return np.array([point for point in points if math.isfinite(point[1])], dtype=float)


def _curves(metric: str, title: str, lines: list[tuple[int, str, np.ndarray]], steps: tuple[float, float]) -> Markup:
    def paint(figure: Figure) -> None:
        axes = figure.add_axes((0.16, 0.19, 0.81, 0.72))  # the same place in every panel, so that steps line up
        for i, _, points in lines:
            step, value = points.T
            window = max(1, len(value) // 20)
            if window > 1:
                axes.plot(step, value, color=SERIES[i], linewidth=0.8, alpha=0.3)
            dashes = (0, DASHES[i]) if DASHES[i] else "-"
            marker = "o" if len(value) == 1 else None
            axes.plot(
                step, _running_mean(value, window), color=SERIES[i], linewidth=LINE, linestyle=dashes, marker=marker
            )
        axes.set_xlabel("step")
        if steps[0] < steps[1]:
            axes.set_xlim(*steps)
        axes.grid(axis="y", linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))

    names = ", ".join(name for _, name, _ in lines)
    return draw(metric, f"{title} over training steps: {names}", (3.6, 2.2), paint)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
