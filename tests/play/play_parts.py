"""Playgrounds small enough for a test, of the pair in tiny.py."""

import base64
import io
import re
from typing import Any

import numpy as np
import tiny
from PIL import Image

from varpi.methods.va_pi import Settings
from varpi.play.opened import Player, Playground
from varpi.weights.pair import Pair

SETTINGS = Settings(name="va_pi", group_size=4, context_noise=0.25, policy_mode="eval", reward={"perceptual_weight": 0})


def playground(*names: str, **changes: Any) -> Playground:
    """Players of these names, each with a generator of its own."""
    tokenizer = tiny.tokenizer()
    players = [Player(name, Pair(tiny.generator(seed=i), tokenizer)) for i, name in enumerate(names or ("tiny",), 1)]
    given = {"settings": SETTINGS, "perceptual": None, "about_reward": "", "class_names": ("a", "b & c", "d")}
    return Playground(tuple(players), **{**given, **changes})


def pictures(html: str) -> list[np.ndarray]:
    """The images of a piece of HTML, uint8 (H,W,C)."""
    found = re.findall(r'src="data:image/(?:png|webp);base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]
