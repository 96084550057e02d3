"""VA-π's step on one picture: the very numbers that training would have."""

import io

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from play_parts import SETTINGS, playground

from varpi.data import BadImage, Batch
from varpi.data.pixels import from_uint8, to_uint8
from varpi.methods.va_pi import VaPi
from varpi.play.picture_step import LARGEST_PICTURE, read_picture, take_step

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, "red" if mode == "RGB" else 0).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("credit", ["image", "local"])
def test_the_advantages_are_those_of_training(credit: str) -> None:
    settings = SETTINGS.model_copy(update={"credit": credit, "condition_drop": 0.0, "advantage_clip": 0.9})
    ground = playground(settings=settings)
    found = take_step(ground, ground.pair, PICTURE, [2], group_size=4, context_noise=0.25, seed=6)

    method = VaPi(tiny.generator(), tiny.tokenizer(), settings, seed=6)
    first = torch.zeros(1, dtype=torch.int64)
    batch = Batch(from_uint8(PICTURE[None]), torch.tensor([2]), first, first, 0)
    outcome = method.loss(batch, 0)
    rollout = outcome.rollout
    assert torch.equal(found.tokens, rollout.targets[0])
    assert torch.equal(found.context, rollout.context[0])
    assert (found.context != found.tokens).any()
    expected = found.advantages if credit == "image" else found.credit
    assert torch.equal(expected, rollout.advantages[0])
    assert (expected.abs() <= 0.9).all()
    assert found.credit.shape == (4, 16)
    assert found.rewards.mean().item() == pytest.approx(outcome.metrics["reward_mean"].item())
    assert found.cross_entropy == pytest.approx(outcome.metrics["cross_entropy"].item())
    decoded = method.tokenizer.decode(rollout.samples[0])
    assert np.array_equal(found.samples, to_uint8(decoded))
    assert torch.allclose(found.rewards, -(decoded - from_uint8(PICTURE[None])).square().mean(dim=(1, 2, 3)))
    whole = method.tokenizer.decode(rollout.targets)
    assert np.array_equal(found.reconstruction, to_uint8(whole)[0])
    assert found.ceiling == pytest.approx(-(whole - from_uint8(PICTURE[None])).square().mean().item())


def test_without_noise_the_context_is_the_picture_and_seeds_differ() -> None:
    ground = playground()
    one, same, other = (
        take_step(ground, ground.pair, PICTURE, [0], group_size=2, context_noise=0.0, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.context, one.tokens)
    assert torch.equal(one.rewards, same.rewards)
    assert not torch.equal(one.rewards, other.rewards)


def test_a_picture_is_cut_as_training_cuts_it() -> None:
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = PICTURE
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "png")
    assert np.array_equal(read_picture(file.getvalue(), playground().pair), PICTURE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture", "the picture: unreadable image"),
        (b"", "the picture: unreadable image"),
        (png((64, 64))[:120], "the picture: unreadable image"),
        (png((6000, 4001), "1"), f"the picture: 6000x4001 pixels are more than {LARGEST_PICTURE}, the most"),
        (png((4000, 20)), "the picture: 4000x20 pixels are too narrow for a square crop"),
    ],
)
def test_what_is_no_picture_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(BadImage, match=message):
        read_picture(content, playground().pair)
