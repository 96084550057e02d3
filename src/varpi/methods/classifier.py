"""Trains a small convolutional classifier: the embedded digits' perceptual network, and, apart from it, the judges.

Shapes: B images of H x W pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.distributed import get_world_size, is_initialized

from varpi.data import Batch
from varpi.errors import VarpiError
from varpi.methods import Outcome
from varpi.networks.convnet import SmallConvNet, save_classifier
from varpi.recipe import Int, MethodSection, Recipe
from varpi.runtime.processes import autocast
from varpi.runtime.randomness import Stream, uniforms
from varpi.runtime.stages import Stages


class Settings(MethodSection):
    """Trains a small convolutional classifier, which judges images of 32 pixels or rewards them."""

    channels: Annotated[tuple[Annotated[Int, Field(ge=1, le=2**12)], ...], Field(max_length=8)] = (16, 32, 64)
    """Width of each stage; the resolution halves between stages."""
    residual: bool = False
    """Each stage adds what its second convolution gives to what its first one gave."""
    norm: Literal["group", "batch"] = "group"
    """Batch normalization takes its statistics from the whole batch: one process, and no micro_batch."""
    shift: Annotated[Int, Field(ge=0, le=2**10)] = 0
    """Every training image is moved by up to so many pixels, down or up and sideways; its edge fills what opens."""
    num_classes: Annotated[Int, Field(ge=2, le=2**20)] = 10

    def check(self, recipe: Recipe) -> None:
        micro_batch = recipe.training.micro_batch
        if self.norm == "batch" and micro_batch is not None:
            raise ValueError(f"training.micro_batch is {micro_batch}; leave it out with method.norm batch")
        if self.norm == "batch" and recipe.training.ema is not None:
            raise ValueError("training.ema averages weights, not what method.norm batch counts; leave one out")
        check_stages(self.channels, recipe)


class Classifier:
    def __init__(
        self, network: SmallConvNet, *, shift: int = 0, seed: int = 0, precision: str = "fp32", device: str = "cpu"
    ) -> None:
        self.model: Any = network
        self.shift = shift
        self.seed = seed
        self.precision = precision
        self.device = device
        self.frozen: tuple[Any, ...] = ()
        self.stages = Stages(device)

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        self.model.train()
        images = batch.images
        if self.shift > 0:
            draws = uniforms(self.seed, step, batch.positions, (2,), stream=Stream.SHIFT)
            images = shifted(images, (draws * (2 * self.shift + 1)).long() - self.shift)
        with self.stages("classifier"), autocast(self.device, self.precision):
            logits = self.model(images).float()
        assert isinstance(batch.condition, Tensor)
        loss = F.cross_entropy(logits, batch.condition)
        accuracy = (logits.argmax(1) == batch.condition).float().mean()
        return Outcome(loss, {"cross_entropy": loss.detach(), "accuracy": accuracy})

    def validation_loss(self, batch: Batch) -> Tensor:
        self.model.eval()
        assert isinstance(batch.condition, Tensor)
        return F.cross_entropy(self.model(batch.images), batch.condition)

    def save(self, path: Path, state_dict: dict[str, Tensor], extra: dict[str, str]) -> None:
        save_classifier(self.model, path, state_dict, extra)


def check_stages(channels: Sequence[int], recipe: Recipe) -> None:
    """Raise ValueError for more stages than the images have halves."""
    size = recipe.data.image_size
    if size < 2 ** (len(channels) - 1):
        raise ValueError(
            f"method.channels names {len(channels)} stages, each of half the resolution; an image of {size} pixels has "
            "too few for that"
        )


def shifted(images: Tensor, by: Tensor) -> Tensor:
    """Each of the images (B,C,H,W) moved by its own whole numbers of pixels, (B,2): down and to the right.

    Where an image left a place, its nearest row or column is repeated.
    """
    height, width = images.shape[2:]
    rows = (torch.arange(height) - by[:, :1]).clamp(0, height - 1).to(images.device)
    columns = (torch.arange(width) - by[:, 1:]).clamp(0, width - 1).to(images.device)
    places = torch.arange(len(images), device=images.device)[:, None, None]
    return images.movedim(1, 3)[places, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> Classifier:
    settings = recipe.method
    assert isinstance(settings, Settings)
    if num_classes is None or num_classes > settings.num_classes:
        found = "captions" if num_classes is None else num_classes
        raise VarpiError(f"method.num_classes is {settings.num_classes}, but the data has {found}")
    if settings.norm == "batch" and is_initialized() and get_world_size() > 1:
        raise VarpiError("method.norm is batch, which takes one process; start it without torchrun")
    network = SmallConvNet(settings.channels, settings.num_classes, residual=settings.residual, norm=settings.norm).to(
        device
    )
    return Classifier(
        network, shift=settings.shift, seed=recipe.seed, precision=recipe.training.precision, device=device
    )
