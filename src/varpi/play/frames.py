"""Images that appear row by row, as their tokens are drawn: of one pair, or of two side by side from the same seed.

Shapes: B images of H x W pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from time import perf_counter
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from varpi.data.pixels import to_uint8
from varpi.play.opened import Player
from varpi.sampling.generate import generate_rows
from varpi.sampling.settings import Sampling
from varpi.weights.pair import Pair


class Frame(NamedTuple):
    """All players' images at one moment."""

    row: int
    """Rows of tokens that are drawn."""
    rows: int
    """Rows there are."""
    images: list[np.ndarray]
    """Of each player, uint8 (B,H,W,4), transparent where nothing is drawn yet."""


def draw_frames(players: Sequence[Player], condition: Any, sampling: Sampling) -> Iterator[Frame]:
    """Frames, the last of which is what `generate_with` and the tokenizer make; closing the iterator stops the drawing.

    Decoding what is not finished is for the eye alone, so it takes at most as long as the drawing: where decoding is
    slow, rows are left out, though never the first and the last.
    """
    grid = players[-1].pair.generator.grid
    with ExitStack() as stack:
        each = [
            stack.enter_context(closing(cast("Any", generate_rows(player.pair.generator, condition, sampling))))
            for player in players
        ]
        drawing = decoding = 0.0
        begun = perf_counter()
        for row, tokens in enumerate(zip(*each, strict=True), 1):
            drawn = perf_counter()
            drawing += drawn - begun
            if row == grid or decoding <= drawing:
                images = [decode_rows(player.pair, part) for player, part in zip(players, tokens, strict=True)]
                decoding += perf_counter() - drawn
                yield Frame(row, grid, images)
            begun = perf_counter()


@torch.inference_mode()
def decode_rows(pair: Pair, tokens: Tensor) -> np.ndarray:
    """The first rows of images, int64 (B, rows x grid), decoded: uint8 (B,H,W,4), transparent below them.

    A decoder needs a whole grid: it is given the last row again in the place of those that are missing, none of which
    is shown. It looks beyond a token's own pixels, so the last rows shown still change a little as others follow.
    """
    grid = pair.generator.grid
    rows = tokens.shape[1] // grid
    whole = torch.cat([tokens, tokens[:, -grid:].repeat(1, grid - rows)], dim=1)
    images = to_uint8(pair.tokenizer.decode(whole))
    alpha = np.full((*images.shape[:3], 1), 255, dtype=np.uint8)
    frame = np.concatenate([images, alpha], axis=-1)
    frame[:, rows * pair.tokenizer.downsample :] = 0
    return frame
