"""The page of a run while it trains, RUN/live.html: it asks itself for news until the run is over.

Of the run's files alone: its log, its recipe and its previews. `varpi report` makes the page of a run that is over.
"""

import base64
import io
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from varpi.recipe import Recipe, parse_recipe, read_yaml
from varpi.report.curves import curve_panels
from varpi.runtime.files import line, write_text
from varpi.training import read_metrics
from varpi.training.logging import duration
from varpi.training.preview import PREVIEWS

SECONDS = 20
"""Between two looks of the page at its file."""
NEWEST = 2
"""Previews that are shown beside the first."""
_WIDEST = 1600
"""Pixels of a picture."""


def write_live(run: Path, over: bool) -> None:
    """Write RUN/live.html as the run stands. What goes wrong is a warning: a page must not stop a run."""
    try:
        write_text(run / "live.html", render_live(run, over), sync=False)
    except Exception as error:
        logging.getLogger("varpi").warning("%s: the page could not be written (%s)", run / "live.html", line(error))


def render_live(run: Path, over: bool) -> str:
    """The page as a string of HTML, all of it in the one file. over: whether it stops asking for news."""
    recipe = parse_recipe(read_yaml(run / "recipe.yaml"), str(run / "recipe.yaml"))
    rows = read_metrics(run)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("live.html").render(
        title=f"{recipe.method.name} · {run.name}",
        refresh=None if over else SECONDS,
        state=_state(recipe, rows, over),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        numbers=_numbers(rows),
        previews=_previews(run, recipe),
        panels=curve_panels({run.name: rows}),
        recipe=recipe.to_yaml(),
    )


def _state(recipe: Recipe, rows: list[dict[str, Any]], over: bool) -> str:
    steps = [row for row in rows if "loss" in row]
    done, of = (steps[-1]["step"] if steps else 0), recipe.training.steps
    if over:
        if done >= of:
            return f"All {of} steps are done."
        return f"The run ended at step {done} of {of}."
    if not steps:
        return f"Training begins: {of} steps."
    recent = steps[-20:]
    left = sum(row["seconds"] for row in recent) / len(recent) * (of - done)
    return f"Step {done} of {of}. About {duration(left)} left by the last {len(recent)} steps."


def _numbers(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """What the latest and the first logged value of each held-out number are: (name, first, latest)."""
    names = {
        "preview_reward": "Reward of the previewed images",
        "preview_loss": "Loss of the previewed images",
        "validation_reward": "Held-out reward",
        "validation_loss": "Held-out loss",
    }
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return [(names[name], f"{values[0]:.4f}", f"{values[-1]:.4f}") for name, values in found.items() if values]


def _previews(run: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """The first preview and the newest, each as the page shows it."""
    found = sorted((run / PREVIEWS).glob("step-*.png"))
    shown = found if len(found) <= NEWEST + 1 else [found[0], *found[-NEWEST:]]
    small = recipe.data.image_size <= 64
    return [
        {"step": int(path.stem.removeprefix("step-")), "image": _embedded(path), "small": small}
        for path in reversed(shown)
    ]


def _embedded(path: Path) -> Markup:
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        picture.thumbnail((_WIDEST, 4 * _WIDEST), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        picture.save(file, "webp", quality=90)
    return Markup("data:image/webp;base64,") + base64.b64encode(file.getvalue()).decode("ascii")
