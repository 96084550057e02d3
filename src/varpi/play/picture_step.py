"""VA-π's step on a visitor's own picture, up to the advantages: what the method sees of one image.

N tokens, G samples, S pixels per side.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varpi import objective
from varpi.data.pixels import from_uint8, to_uint8
from varpi.data.transforms import load_image
from varpi.methods.rewards import pixel_rewards
from varpi.play.opened import Playground
from varpi.runtime.randomness import Stream, uniforms
from varpi.weights.pair import Pair

MOST_PIXELS = 24_000_000
"""Width times height of the largest picture that is decoded."""


@dataclass(frozen=True)
class PictureStep:
    """Everything there is to see. Rewards are minus a distance, nearer 0 is better."""

    tokens: Tensor
    """Int64 (N,), the picture's own x*."""
    context: Tensor
    """Int64 (N,), x̃*: the same after context noise; all that the generator sees."""
    reconstruction: np.ndarray
    """uint8 (S,S,3): x* decoded, the best that any generator can do."""
    ceiling: float
    """Its reward."""
    cross_entropy: float
    """Of x* given x̃*, in nats per token."""
    samples: np.ndarray
    """uint8 (G,S,S,3)."""
    rewards: Tensor
    """Float32 (G,)."""
    parts: dict[str, Tensor]
    """The distances that the reward is made of, float32 (G,) each, before their weights."""
    advantages: Tensor
    """Float32 (G,), of each sample within the group (Eq. 4)."""
    credit: Tensor
    """Float32 (G,N), of each token (`credit: local`)."""


def read_picture(content: bytes, pair: Pair) -> np.ndarray:
    """What training would see of an image's file: uint8 (S,S,3), scaled and cut to the pair's size.

    Raises VarpiError for what is no image, is damaged, or has more than `MOST_PIXELS`.
    """
    return to_uint8(load_image(content, "the picture", pair.image_size, max_pixels=MOST_PIXELS)[None])[0]


@torch.no_grad()
def take_step(
    playground: Playground,
    pair: Pair,
    picture: np.ndarray,
    asked: Any,
    *,
    group_size: int,
    context_noise: float,
    seed: int,
) -> PictureStep:
    """Encode, corrupt, predict, sample, decode, reward, compare (VA-π Eq. 4-10); nothing is trained, dropout is off.

    picture: uint8 (S,S,3). asked: a class id or a prompt. group_size: G >= 2. context_noise: ξ in [0,1].
    """
    generator, tokenizer, settings = pair.generator, pair.tokenizer, playground.settings
    images = from_uint8(picture[None]).to(generator.device)
    condition = generator.prepare_condition([asked])

    targets = tokenizer.encode(images)
    shape = (1, targets.shape[1])
    noise = uniforms(seed, 0, [0], (shape[1], 2), stream=Stream.CONTEXT_NOISE, device=images.device)
    exclude_true = not settings.compat.uniform_noise
    context = objective.corrupt(targets, context_noise, generator.vocab_size, uniforms=noise, exclude_true=exclude_true)
    logits = generator.logits(context, condition)
    draws = uniforms(seed, 0, [0], (group_size, shape[1]), stream=Stream.SAMPLES, device=images.device)
    samples = objective.sample_tokens(logits, group_size, uniforms=draws)

    scored = images, playground.perceptual
    rewards = pixel_rewards(settings.reward, tokenizer, samples, *scored, local=True)
    ceiling = pixel_rewards(settings.reward, tokenizer, targets[:, None], *scored)
    assert rewards.maps is not None
    how: Any = {name: getattr(settings, name) for name in ("baseline", "scale_by_std")}
    how["clip"] = settings.advantage_clip
    decoded = [to_uint8(tokenizer.decode(part)) for part in samples[0].split(settings.reward.decode_batch)]
    return PictureStep(
        tokens=targets[0],
        context=context[0],
        reconstruction=to_uint8(tokenizer.decode(targets))[0],
        ceiling=ceiling.total.item(),
        cross_entropy=objective.prior_loss(logits, targets).item(),
        samples=np.concatenate(decoded),
        rewards=rewards.total[0],
        parts={name: part[0] for name, part in rewards.parts.items()},
        advantages=objective.group_advantages(rewards.total, **how)[0],
        credit=objective.local_advantages(rewards.maps, **how)[0],
    )
