"""Scenes of shapes as pixels: each shape by its distance from the edge, which the pixels on it are blended by."""

from functools import lru_cache

import numpy as np

from varpi.data.scenes import Pattern, Scene, Thing

_RING_HOLE = 0.42
_CROSS_ARM = 0.36
_STAR_INNER = 0.45
"""Radius of the hole, half the width of an arm and radius of the inner corners, in units of half the shape's size."""


def render_scene(scene: Scene, size: int) -> np.ndarray:
    """The image of a scene, uint8 (size, size, 3)."""
    x, y = _grid(size)
    canvas = np.empty((size, size, 3))
    share = (1 + _values(scene.background, x, y)) / 2
    for channel in range(3):
        canvas[..., channel] = scene.low[channel] + (scene.high[channel] - scene.low[channel]) * share
    for thing in scene.things:
        # One pixel more than its square, for the blended edge
        first_x, last_x = _reach(thing.x, thing.size, size)
        first_y, last_y = _reach(thing.y, thing.size, size)
        x = (np.arange(first_x, last_x) + 0.5)[None] / size - thing.x
        y = (np.arange(first_y, last_y) + 0.5)[:, None] / size - thing.y
        inside = np.clip(0.5 - _distance(thing.shape, x, y, thing.size / 2) * size, 0, 1)
        shade = thing.contrast * _values(thing.texture, x, y)
        patch = canvas[first_y:last_y, first_x:last_x]
        for channel in range(3):
            patch[..., channel] += inside * (np.clip(thing.rgb[channel] + shade, 0, 1) - patch[..., channel])
    return (canvas * 255 + 0.5).astype(np.uint8)


def box_of(thing: Thing, size: int) -> tuple[float, float, float, float]:
    """Left, upper, right and lower edge of a thing, in pixels of an image of that side."""
    left = upper = right = lower = thing.size / 2
    if thing.shape == "star":
        left = right = left * np.sin(0.4 * np.pi)
        lower = lower * np.cos(0.2 * np.pi)
    edges = thing.x - left, thing.y - upper, thing.x + right, thing.y + lower
    return tuple(float(edge * size) for edge in edges)  # pyright: ignore[reportReturnType]


def _reach(centre: float, extent: float, size: int) -> tuple[int, int]:
    return max(int((centre - extent / 2) * size) - 1, 0), min(int((centre + extent / 2) * size) + 2, size)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How far points are outside a shape that fills [-radius, radius] squared; negative inside, exact near edges."""
    match shape:
        case "circle":
            return np.hypot(x, y) - radius
        case "ring":
            far = np.hypot(x, y)
            return np.maximum(far - radius, _RING_HOLE * radius - far)
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - radius
        case "cross":
            wide, high, arm = np.abs(x), np.abs(y), _CROSS_ARM * radius
            return np.maximum(np.minimum(wide, high) - arm, np.maximum(wide, high) - radius)
        case "triangle":  # standing on a side, as high as it is wide
            return np.maximum(y - radius, (2 * np.abs(x) - y - radius) / 5**0.5)
        case _:  # a star with a tip up: one edge, from a tip to an inner corner, turned and mirrored ten times
            tenth = np.pi / 5
            turned = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)
            far = np.hypot(x, y)
            across, along = _STAR_INNER * np.sin(tenth), 1 - _STAR_INNER * np.cos(tenth)
            return (far * (np.cos(turned) * across + np.sin(turned) * along) - radius * across) / np.hypot(
                across, along
            )


def _values(pattern: Pattern, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values in [-1, 1] of a pattern at points."""
    cos, sin = np.cos(pattern.angle), np.sin(pattern.angle)
    turn = 2 * np.pi / pattern.period
    match pattern.kind:
        case "plain":
            return np.zeros(np.broadcast_shapes(x.shape, y.shape))
        case "shade":
            return np.clip(np.cos(pattern.phase) * x * 2 + np.sin(pattern.phase) * y * 2, -1, 1)
        case "stripes":
            return np.sin(turn * (cos * x + sin * y) + pattern.phase)
        case "checks":
            return np.sin(turn * x + pattern.phase) * np.sin(turn * y + pattern.phase)
        case _:  # clouds: two waves that meet
            return (np.sin(turn * (cos * x + sin * y) / 2 + pattern.phase) + np.sin(turn * (sin * x - cos * y) / 3)) / 2


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x (1, size) and y (size, 1) of the pixels' centres."""
    places = (np.arange(size) + 0.5) / size
    return places[None], places[:, None]
