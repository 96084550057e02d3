"""How all figures are drawn: as inline SVG whose colours are the page's own, and told apart without colour as well."""

import io
import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Stand-ins that matplotlib writes and the page's style sheet takes over, so that figures follow light and dark.
INK, RULE = "#010101", "#020202"
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
LINE = 1.8
DASHES = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2), (9, 3), (3, 1))  # in line widths


def _polygon(corners: int, turn: float = 0.0) -> list[tuple[float, float]]:
    angles = [2 * math.pi * (corner / corners + turn) for corner in range(corners)]
    return [(math.sin(angle), math.cos(angle)) for angle in angles]


MARKS = (
    _polygon(24),
    _polygon(3),
    _polygon(4, 1 / 8),
    _polygon(3, 1 / 2),
    _polygon(4),
    [(x * (1 if i % 2 else 0.4), y * (1 if i % 2 else 0.4)) for i, (x, y) in enumerate(_polygon(10, 1 / 20))],
)
"""One shape a series, corners in the unit circle, y upwards: disc, triangle, square, triangle down, diamond, star."""


class Panel(NamedTuple):
    """One figure, as an SVG element."""

    title: str
    note: str
    svg: Markup


class Key(NamedTuple):
    """What stands before a name in a legend: a line's dashes, and a mark as an SVG path around (18, 4)."""

    name: str
    dashes: str
    mark: str


def legend(names: Iterable[str]) -> list[Key]:
    """A key for each series, for lines of the figures' own width."""
    return [
        Key(
            name,
            " ".join(str(dash * LINE) for dash in dashes),
            "M" + "L".join(f"{18 + 4 * x:.2f} {4 - 4 * y:.2f}" for x, y in mark) + "Z",
        )
        for name, dashes, mark in zip(names, DASHES, MARKS, strict=False)
    ]


def draw(prefix: str, label: str, size: tuple[float, float], paint: Callable[[Figure], object]) -> Markup:
    """What `paint` puts on a figure of `size` inches, as an SVG element.

    prefix: unique on the page, for the ids. label: what the figure shows, for those who do not see it.
    """
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": prefix,
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
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        paint(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), prefix, label)


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
