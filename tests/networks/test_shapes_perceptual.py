"""The perceptual distance of the shapes: a network apart from the detector that judges, which sees what matters."""

from dataclasses import replace

import torch

from varpi.data.pixels import from_uint8
from varpi.data.rendering import render_scene
from varpi.data.scenes import Pattern, Scene, draw_scene
from varpi.networks.loading import load_perceptual
from varpi.weights import embedded, sha256_of


def distance_of(changed: list[Scene], scenes: list[Scene]) -> torch.Tensor:
    network = load_perceptual("shapes", None, "cpu")
    pairs = [torch.cat([from_uint8(render_scene(scene, 32)[None]) for scene in some]) for some in (changed, scenes)]
    return network.distance(network.maps(pairs[0]), network.maps(pairs[1]))


def test_a_missing_shape_is_far_and_a_missing_texture_near() -> None:
    scenes = [draw_scene("test", index) for index in range(60)]
    plain = Pattern("plain", 0, 1, 0)
    assert distance_of(scenes, scenes).abs().max() == 0
    smooth = [replace(scene, things=tuple(replace(thing, texture=plain) for thing in scene.things)) for scene in scenes]
    missing = [replace(scene, things=scene.things[1:]) for scene in scenes]
    near, far = distance_of(smooth, scenes), distance_of(missing, scenes)
    assert far.min() > 0
    assert (far > near).float().mean() > 0.95
    assert far.mean() > 3 * near.mean()


def test_what_rewards_is_not_what_judges() -> None:
    assert sha256_of(embedded("shapes", "perceptual")) != sha256_of(embedded("shapes", "detector"))
