"""Trains a small convolutional classifier: the embedded digits' perceptual network, and, separately, their judge."""

from pathlib import Path
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from varpi.data import Batch
from varpi.errors import VarpiError
from varpi.methods import Outcome
from varpi.networks.convnet import SmallConvNet, save_classifier
from varpi.recipe import Int, MethodSection, Recipe
from varpi.runtime.processes import autocast
from varpi.runtime.stages import Stages


class Settings(MethodSection):
    """Trains a small convolutional classifier, which judges or rewards the embedded digits."""

    channels: Annotated[tuple[Annotated[Int, Field(ge=1, le=2**12)], ...], Field(max_length=8)] = (16, 32, 64)
    num_classes: Annotated[Int, Field(ge=2, le=2**20)] = 10


class Classifier:
    def __init__(self, network: SmallConvNet, *, precision: str = "fp32", device: str = "cpu") -> None:
        self.model: Any = network
        self.precision = precision
        self.device = device
        self.frozen: tuple[Any, ...] = ()
        self.stages = Stages(device)

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        self.model.train()
        with self.stages("classifier"), autocast(self.device, self.precision):
            logits = self.model(batch.images).float()
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


def from_recipe(recipe: Recipe, num_classes: int | None, device: str) -> Classifier:
    settings = recipe.method
    assert isinstance(settings, Settings)
    if num_classes is None or num_classes > settings.num_classes:
        found = "captions" if num_classes is None else num_classes
        raise VarpiError(f"method.num_classes is {settings.num_classes}, but the data has {found}")
    network = SmallConvNet(settings.channels, settings.num_classes).to(device)
    return Classifier(network, precision=recipe.training.precision, device=device)
