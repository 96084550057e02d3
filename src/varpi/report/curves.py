"""Learning curves as inline SVG: one small panel per metric, all on the same steps, in the page's own colours."""

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from varpi.errors import VarpiError

PANELS = {
    "reward_mean": ("Reward", "mean over all samples; higher is better"),
    "mse": ("Pixel error", "mean squared error of sampled against real image"),
    "perceptual": ("Perceptual distance", "of sampled against real image"),
    "reward_std": ("Reward spread", "standard deviation within a group of samples"),
    "policy_loss": ("Policy loss", "clipped surrogate, Eq. 11"),
    "cross_entropy": ("Cross-entropy", "of the true tokens, nats"),
    "validation_loss": ("Held-out loss", "cross-entropy of held-out tokens, nats"),
    "entropy": ("Entropy", "of the predicted token, nats"),
    "clip_fraction": ("Clip fraction", "share of tokens whose ratio was clipped"),
    "approx_kl": ("Approximate KL", "from the policy that drew the samples"),
    "gradient_norm": ("Gradient norm", "before clipping"),
}
"""Metric -> (title, what it says). Other metrics of a log, such as timings, are not drawn."""

# Stand-ins that matplotlib writes and the page's style sheet takes over, so that curves follow light and dark.
INK, RULE = "#010101", "#020202"
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
LINE = 1.8
DASHES = (
    (),
    (5, 2),
    (1.5, 1.5),
    (7, 2, 1.5, 2),
    (9, 3),
    (3, 1),
)  # in line widths; curves stay apart in black and white


class Panel(NamedTuple):
    """One metric's curves, as an SVG element."""

    title: str
    note: str
    svg: Markup


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
            panels.append(Panel(title, note, _draw(metric, title, lines, (min(steps), max(steps)))))
    return panels


def legend(names: Iterable[str]) -> list[tuple[str, str]]:
    """(name, stroke-dasharray) of each run, for a key drawn with lines of the curves' own width."""
    return [(name, " ".join(str(dash * LINE) for dash in dashes)) for name, dashes in zip(names, DASHES, strict=False)]


def _points(records: Sequence[Mapping[str, float]], metric: str) -> np.ndarray:
    """(n,2) of step and value; a value that is missing or not finite (a skipped update) is left out."""
    points = [(record["step"], record[metric]) for record in records if record.get(metric) is not None]
    return np.array([point for point in points if math.isfinite(point[1])], dtype=float)


def _draw(metric: str, title: str, lines: list[tuple[int, str, np.ndarray]], steps: tuple[float, float]) -> Markup:
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": metric,
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": RULE,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(3.6, 2.2))
        FigureCanvasSVG(figure)
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
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    names = ", ".join(name for _, name, _ in lines)
    return _inline(file.getvalue(), metric, f"{title} over training steps: {names}")


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _inline(svg: str, prefix: str, label: str) -> Markup:
    """Fit a stand-alone SVG into a page: own ids, the page's colours, no style sheet, no foreign address."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|\sxmlns(:\w+)?=\"[^\"]*\"", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    for i, color in enumerate(SERIES):
        svg = svg.replace(color, f"var(--series-{i + 1})")
    return Markup(svg.replace('role="img">', Markup('role="img" aria-label="{}">').format(label), 1))
