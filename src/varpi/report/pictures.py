"""Pictures of the page: samples side by side, reconstructions, and the worst and best by a score.

Shapes: n images of H x W pixels, uint8 (n,H,W,3).
"""

import base64
import io
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image
from torch.nn import functional

from varpi.errors import VarpiError
from varpi.report.tables import number
from varpi.samples.images import make_grid, save_png

PICTURE = "before-after.png"
WIDEST = 2400
"""Pixels across a picture, which opens to the size of the screen."""
LARGEST_TILE = 384
SHARP = 64
"""Images up to this side are kept as they are, enlarged; larger ones are photographs, which WebP holds in a tenth."""


class SampleGrid(NamedTuple):
    """Samples of one model: uint8 images (n,H,W,3) and what was asked of each (n,), a class id or a prompt."""

    caption: str
    images: np.ndarray
    asked: Sequence[int] | Sequence[str]


class Reconstruction(NamedTuple):
    """One image seen four ways, each uint8 (H,W,3): itself, through the tokenizer, and as base and tuned predict it
    token by token with the true tokens before (teacher forcing)."""

    original: np.ndarray
    tokenizer: np.ndarray
    base: np.ndarray
    tuned: np.ndarray


class ScoredImages(NamedTuple):
    """Samples of one model with a score each, of which the page shows the worst and the best."""

    caption: str
    images: np.ndarray
    """uint8 (n,H,W,3)."""
    scores: Sequence[float] | np.ndarray
    """(n,), finite."""
    score: str
    """What the score is called."""
    asked: Sequence[int] | Sequence[str] = ()
    """What was asked of each (n,), a class id or a prompt; () where that is not known."""
    lower_is_better: bool = False
    most: int = 6
    """How many of the worst, and of the best."""


def grid(samples: SampleGrid) -> dict[str, Any]:
    """What the page needs to show a grid: of equally many of each class or prompt, a column for each."""
    images = _checked(samples.images, f"the samples of {samples.caption}")
    asked = np.asarray(samples.asked)
    if asked.shape != (len(images),):
        raise VarpiError(f"report: the samples of {samples.caption}: {len(images)} images, {len(asked)} conditions")
    kinds, counts = np.unique(asked, return_counts=True)
    alt, large = f"{samples.caption}: {len(images)} generated images", max(images.shape[1:3]) > SHARP
    if not _fills_columns(kinds, counts):
        image = _mosaic(images, math.ceil(math.sqrt(len(images))))
        return {"caption": samples.caption, "alt": alt, "image": image, "heads": [], "prompts": [], "large": large}
    order = _by_column(asked, len(kinds))
    prompts = kinds.tolist() if kinds.dtype.kind == "U" else []
    heads = list(range(1, len(kinds) + 1)) if prompts else kinds.tolist()
    alt += f", one {'prompt' if prompts else 'class'} a column: {', '.join(map(str, kinds))}"
    image = _mosaic(images[order], len(kinds))
    shown = {"caption": samples.caption, "alt": alt, "image": image}
    return {**shown, "heads": heads, "prompts": prompts, "large": large}


def before_after(path: str | os.PathLike[str], before: SampleGrid, after: SampleGrid) -> None:
    """One PNG file, for a model card or a README: samples from before on the left, from after on the right."""
    tiles = []
    for samples in (before, after):
        images = _checked(samples.images, f"the samples of {samples.caption}")
        small = max(images.shape[1:3]) <= SHARP
        images = images.repeat(2, axis=1).repeat(2, axis=2) if small else _shrunk(images, 192)
        asked = np.asarray(samples.asked)
        kinds, counts = np.unique(asked, return_counts=True)
        columns = math.ceil(math.sqrt(len(images)))
        if counts[0] > 1 and _fills_columns(kinds, counts):
            images, columns = images[_by_column(asked, len(kinds))], len(kinds)
        tiles.append(make_grid(images, columns, gap=4))
    if tiles[0].shape != tiles[1].shape:
        raise VarpiError("report: before and after are not as many samples of one size")
    between = np.full((len(tiles[0]), 32, 3), 255, dtype=np.uint8)
    save_png(path, np.concatenate([tiles[0], between, tiles[1]], axis=1))


def _fills_columns(kinds: np.ndarray, counts: np.ndarray) -> bool:
    """Whether there are a few kinds, and equally many of each."""
    return 1 < len(kinds) <= 12 and bool((counts == counts[0]).all())


def _by_column(asked: np.ndarray, kinds: int) -> np.ndarray:
    """The order, row by row, that gives each kind a column."""
    return np.argsort(asked, kind="stable").reshape(kinds, -1).T.reshape(-1)


def strips(reconstructions: Sequence[Reconstruction]) -> list[dict[str, Any]]:
    """What the page needs to show reconstructions: a strip for each of the four views."""
    labels = {
        "original": ("Original", "the image"),
        "tokenizer": ("Tokenizer", "encoded and decoded: the best any generator can do"),
        "base": ("Base", "sampled under teacher forcing"),
        "tuned": ("Tuned", "sampled under teacher forcing, after post-training"),
    }
    if not reconstructions:
        return []
    shapes = {np.shape(image) for reconstruction in reconstructions for image in reconstruction}
    if len(shapes) != 1:
        raise VarpiError(f"report: the reconstructions have images of different shapes: {sorted(shapes)}")
    views = {
        name: _checked(np.stack([getattr(row, name) for row in reconstructions]), f"reconstructions, {name}")
        for name in labels
    }
    errors = {name: _local_error(views[name], views["original"]) for name in ("base", "tuned")}
    largest = max(np.quantile(error, 0.995) for error in errors.values()) or 1.0
    for name, error in errors.items():
        labels[f"{name}_error"] = (f"{labels[name][0]}, error", "where it differs from the original; bright is more")
        views[f"{name}_error"] = _heat(error / largest)
    made = []
    for name, (label, note) in labels.items():
        alt = f"{label}, {note}: {len(views[name])} images, each below the same image in the strip above"
        made.append({"label": label, "note": note, "alt": alt, "image": _mosaic(views[name], len(views[name]))})
    return made


def extremes(scored: ScoredImages) -> dict[str, Any]:
    """What the page needs to show the worst and the best; equal scores in the order given. No image is in both."""
    images = _checked(scored.images, f"the scored images of {scored.caption}")
    scores = np.asarray(scored.scores, dtype=np.float64)
    if scores.shape != (len(images),) or (len(scored.asked) and len(scored.asked) != len(images)):
        asked = f", {len(scored.asked)} conditions" if len(scored.asked) else ""
        raise VarpiError(
            f"report: the scored images of {scored.caption}: {len(images)} images, {scores.size} scores{asked}"
        )
    if not np.isfinite(scores).all():
        raise VarpiError(
            f"report: the scores of {scored.caption} hold values that are not finite; leave these images out"
        )
    if len(images) < 2 or scored.most < 1:
        raise VarpiError(f"report: the scored images of {scored.caption}: at least 2 images and `most` of 1 are needed")
    order = np.argsort(-scores if scored.lower_is_better else scores, kind="stable")
    count = min(scored.most, len(images) // 2)

    def tile(index: int) -> dict[str, Any]:
        asked = str(scored.asked[index]) if len(scored.asked) else ""
        score = number(scores[index], 3)
        alt = f"{scored.caption}, image {index}: {scored.score} {score}{', ' if asked else ''}{asked}"
        return {"score": score, "asked": asked, "alt": alt, "image": _mosaic(images[index : index + 1], 1, widest=256)}

    return {
        "caption": scored.caption,
        "note": f"{scored.score}, {'lower' if scored.lower_is_better else 'higher'} is better; "
        f"of {len(images)} images, the median has {number(float(np.median(scores)), 3)}",
        "rows": [
            ("Worst", [tile(int(index)) for index in order[:count]]),
            ("Best", [tile(int(index)) for index in order[::-1][:count]]),
        ],
    }


def _local_error(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """The absolute difference (n,H,W), a mean over channels and over squares of a sixteenth of the side."""
    difference = torch.from_numpy(np.abs(images.astype(np.float32) - originals).mean(axis=3))
    size = max(3, images.shape[1] // 16 | 1)
    return functional.avg_pool2d(difference[:, None], size, 1, size // 2, count_include_pad=False)[:, 0].numpy()


def _heat(values: np.ndarray) -> np.ndarray:
    """Values (n,H,W) from 0 to 1 as colours, uint8 (n,H,W,3), from black over red to white."""
    return (colormaps["inferno"](values.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)


def _checked(images: np.ndarray, name: str) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or images.size == 0:
        raise VarpiError(f"report: {name}: expected uint8 of shape (n, H, W, 3), got {images.dtype} {images.shape}")
    return images


def _mosaic(images: np.ndarray, columns: int, widest: int = WIDEST) -> Markup:
    """Images (n,H,W,3) row by row in one picture with transparent gaps, as a data URI.

    Small images are enlarged here to whole multiples: a browser that scales 32 pixels to 45 either blurs them or makes
    some pixels wider than others, whereas shrinking a large mosaic shows even, sharp pixels. Photographs are shrunk to
    what a page can show.
    """
    height, width = images.shape[1:3]
    small = max(height, width) <= SHARP
    if small:
        factor = max(1, round(128 / max(height, width)))
        images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    else:
        images = _shrunk(images, min(LARGEST_TILE, widest // columns))
    count, height, width, _ = images.shape
    gap = max(2, height // 16)
    rows = math.ceil(count / columns)
    mosaic = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        mosaic[top : top + height, left : left + width, :3] = image
        mosaic[top : top + height, left : left + width, 3] = 255
    return _data_uri(Image.fromarray(mosaic), lossless=small)


def _shrunk(images: np.ndarray, side: int) -> np.ndarray:
    """Images whose longer side is at most `side` pixels."""
    height, width = images.shape[1:3]
    scale = side / max(height, width)
    if scale >= 1:
        return images
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images])


def _data_uri(image: Image.Image, *, lossless: bool) -> Markup:
    file = io.BytesIO()
    if lossless:
        image.save(file, format="png", optimize=True)
    else:
        image.save(file, format="webp", quality=90, method=4)
    kind = "png" if lossless else "webp"
    return Markup(f"data:image/{kind};base64,") + base64.b64encode(file.getvalue()).decode("ascii")
