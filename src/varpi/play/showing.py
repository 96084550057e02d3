"""What the page shows, as HTML: pictures as data URIs, so that no file is written for them; all text escaped.

H x W pixels, N tokens, G samples, K codes.
"""

import base64
import colorsys
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from varpi.errors import VarpiError
from varpi.play.frames import Frame
from varpi.play.picture_step import PictureStep
from varpi.report.page import render
from varpi.report.pictures import SHARP
from varpi.report.tables import mean_and_std, number
from varpi.runtime.files import line
from varpi.studies.findings import page_of, read_findings
from varpi.tokenizers import Tokenizer

BETTER, WORSE = (0x14, 0x71, 0x7F), (0xC2, 0x57, 0x1A)
"""The first two of a report's series of colours."""
LEGIBLE = 16
"""Tokens per side up to which their numbers are written into their places."""


def show_error(message: str) -> Markup:
    return Markup('<p class="refused" role="alert">{}</p>').format(message)


def show_status(message: str) -> Markup:
    return Markup('<p class="status" role="status">{}</p>').format(message)


def show_frame(names: Sequence[str], asked: str, frame: Frame) -> Markup:
    """Each player's images, side by side."""
    done = frame.row == frame.rows
    figures = []
    for name, images in zip(names, frame.images, strict=True):
        shown = [
            _picture(image, f"{name}: {asked}, image {i}" + ("" if done else ", not finished"), lossless=done)
            for i, image in enumerate(images, 1)
        ]
        figures.append(_figure(name, "", Markup('<div class="images">{}</div>').format(Markup("").join(shown))))
    return Markup('<div class="players">{}</div>').format(Markup("").join(figures))


def show_step(step: PictureStep, picture: np.ndarray, colors: np.ndarray) -> Markup:
    """The step from left to right: picture, tokens, reconstruction; then the group.

    colors: of the codes, see `code_colors`.
    """
    replaced = int((step.tokens != step.context).sum())
    own = "the picture's own" + ("" if replaced else ", which the generator is shown")
    parts = [
        _figure("Picture", "as training would cut it", _picture(picture, "the picture")),
        _figure("Tokens x*", own, _tokens(step.tokens, None, colors)),
    ]
    if replaced:
        note = f"what the generator is shown: {replaced} are replaced"
        parts.append(_figure("Context x̃*", note, _tokens(step.context, step.tokens, colors)))
    note = f"x* decoded; reward {_reward(step.ceiling)}"
    parts.append(_figure("Reconstruction", note, _picture(step.reconstruction, "the reconstruction")))
    mean, std = mean_and_std(step.rewards.mean().item(), step.rewards.std().item())
    said = Markup(
        "<p>{} samples, each token drawn by what the generator expects after the true tokens before it. Reward {} ± {} "
        "over the group; the picture's own tokens cost {} nats each.</p>"
    ).format(len(step.rewards), mean.replace("-", "−"), std, number(step.cross_entropy, 3))
    return Markup('<div class="parts">{}</div>{}<div class="group">{}</div>{}').format(
        Markup("").join(parts), said, Markup("").join(map(Markup, _cards(step))), _LEGEND
    )


_LEGEND = Markup(
    '<p class="note">Beside each sample: the credit of its tokens, that is, whether the picture around each came nearer '
    'to yours than in the other samples (<i class="key better"></i>) or less near (<i class="key worse"></i>). '
    "<code>credit: image</code>, the paper's, gives all tokens of a sample its advantage; <code>credit: local</code> "
    "gives each its own. Rewards are minus a distance: nearer 0 is better.</p>"
)


def _cards(step: PictureStep) -> list[Markup]:
    """The samples in the order in which they were drawn."""
    best, worst = int(step.advantages.argmax()), int(step.advantages.argmin())
    cards = []
    for i, sample in enumerate(step.samples):
        advantage = step.advantages[i].item()
        parts = ", ".join(f"{name} {number(values[i].item(), 3)}" for name, values in step.parts.items())
        rank = " (best)" if i == best != worst else " (worst)" if i == worst != best else ""
        cards.append(
            Markup(
                '<figure class="card"><div class="two">{}{}</div><figcaption><b>Sample {}{}</b>'
                '<span class="{}">advantage {}</span><small>reward {}</small><small>{}</small></figcaption></figure>'
            ).format(
                _picture(sample, f"sample {i + 1}"),
                _picture(credit_map(step.credit[i]), f"the credit of sample {i + 1}"),
                i + 1,
                rank,
                "better" if advantage > 0 else "worse",
                f"{advantage:+.2f}".replace("-", "−"),
                _reward(step.rewards[i].item()),
                parts,
            )
        )
    return cards


def credit_map(credit: Tensor) -> np.ndarray:
    """Advantages (N,) as uint8 (H,W,4), a pixel a token: the colour says the sign, the opacity how much, up to 2."""
    values = credit.cpu().numpy().reshape(math.isqrt(len(credit)), -1)
    color = np.where(values[..., None] > 0, BETTER, WORSE).astype(np.uint8)
    opacity = (255 * np.minimum(np.abs(values) / 2, 1)).round().astype(np.uint8)
    return np.concatenate([color, opacity[..., None]], axis=-1)


def code_colors(tokenizer: Tokenizer) -> np.ndarray:
    """A colour for every code, uint8 (K,3): codes that are alike look alike, where the tokenizer tells its vectors."""
    try:
        vectors = tokenizer.code_vectors().detach().float().cpu()
    except VarpiError:  # one hue after the other, each far from the last
        hues = (np.arange(tokenizer.codebook_size) * (math.sqrt(5) - 1) / 2) % 1
        return (255 * np.array([colorsys.hsv_to_rgb(hue, 0.45, 0.9) for hue in hues])).round().astype(np.uint8)
    vectors = vectors - vectors.mean(dim=0)
    directions = torch.linalg.svd(vectors, full_matrices=False).Vh[:3]
    places = vectors @ (directions * directions.sum(dim=1, keepdim=True).sign()).T  # an SVD's signs are arbitrary
    ranks = places.argsort(dim=0).argsort(dim=0) / max(1, len(places) - 1)
    colors = np.full((len(places), 3), 128, dtype=np.uint8)
    colors[:, : ranks.shape[1]] = (60 + 180 * ranks.numpy()).round().astype(np.uint8)
    return colors


def _tokens(tokens: Tensor, true: Tensor | None, colors: np.ndarray) -> Markup:
    """A grid of tokens in their codes' colours, those that differ from the true ones outlined."""
    side = math.isqrt(len(tokens))
    cells = []
    for i, token in enumerate(tokens.tolist()):
        red, green, blue = colors[token].tolist()
        ink = "#000" if 0.3 * red + 0.6 * green + 0.1 * blue > 140 else "#fff"
        other = ' class="replaced"' if true is not None and token != int(true[i]) else ""
        text = str(token) if side <= LEGIBLE else ""
        cells.append(
            f'<i{other} title="token {token}" style="background:#{red:02x}{green:02x}{blue:02x};color:{ink}">{text}</i>'
        )
    digits = len(str(len(colors) - 1))
    return Markup(
        '<div class="tokens" style="--side:{};--digits:{}" role="img" aria-label="{} tokens">{}</div>'
    ).format(side, digits, len(tokens), Markup("".join(cells)))


def _reward(value: float) -> str:
    return number(value, 3)


def _figure(title: str, note: str, content: Markup) -> Markup:
    small = Markup("<small>{}</small>").format(note) if note else ""
    return Markup("<figure><figcaption><b>{}</b>{}</figcaption>{}</figure>").format(title, small, content)


def _picture(image: np.ndarray, alt: str, *, lossless: bool = True) -> Markup:
    """An image, uint8 (H,W,3) or (H,W,4). Photographs that are replaced at once are WebP, a tenth the size."""
    small = max(image.shape[:2]) <= SHARP
    file, kind = io.BytesIO(), "png" if lossless or small else "webp"
    Image.fromarray(image).save(file, format=kind)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return Markup('<img class="{}" width="{}" height="{}" src="data:image/{};base64,{}" alt="{}">').format(
        "sharp" if small else "photograph", image.shape[1], image.shape[0], kind, data, alt
    )


# -- studies


def find_studies(places: Sequence[Path]) -> list[Path]:
    """The study.json files among these files and at most two folders below these directories."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            for depth in ("", "*/", "*/*/"):
                found += sorted(place.glob(f"{depth}study.json"))
        elif place.is_file():
            found.append(place)
    return list(dict.fromkeys(found))


def show_study(path: Path) -> Markup:
    """A study's page as `varpi study` writes it, without samples, in a frame that runs nothing."""
    findings = read_findings(path)
    try:
        page = render(page_of(findings, ""))
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise VarpiError(f"{path}: not what `varpi study` writes ({line(error)})") from error
    frame = Markup('<iframe class="study" sandbox="" title="{}" srcdoc="{}"></iframe>')
    return frame.format(findings.study.title, page)
