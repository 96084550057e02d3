"""The small classifiers of the embedded digits, and the perceptual distances that a reward can name."""

import json
import os
from collections.abc import Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor

from varpi.errors import VarpiError
from varpi.networks.convnet import SmallConvNet
from varpi.networks.perceptual import LPIPS, ConvFeatures
from varpi.objective.rewards import Perceptual
from varpi.runtime.files import write_aside
from varpi.runtime.tensors import embedded, read_checkpoint


def save_classifier(
    network: SmallConvNet, path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], extra: Mapping[str, str]
) -> None:
    """Write a classifier's full weights as safetensors with its configuration inside."""
    config = {"channels": list(network.channels), "num_classes": network.num_classes}
    description = {"format": 1, "kind": "classifier", "architecture": "small-conv-net", "config": config}
    metadata = {"format": "pt", **extra, "varpi": json.dumps(description)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    write_aside(path, lambda aside: save_file(tensors, aside, metadata=metadata))


def load_classifier(path: str | os.PathLike[str], device: str = "cpu") -> SmallConvNet:
    """A classifier that `save_classifier` wrote, frozen, in eval mode."""
    checkpoint = read_checkpoint(path)
    description = json.loads(checkpoint.metadata.get("varpi", "{}"))
    if description.get("kind") != "classifier":
        raise VarpiError(f"{os.fspath(path)}: holds no classifier that varpi wrote")
    network = SmallConvNet(**description["config"])
    network.load_state_dict(checkpoint.tensors)
    return network.requires_grad_(False).eval().to(device)


def load_perceptual(name: str, weights: str | None, device: str) -> Perceptual:
    """The perceptual distance a recipe names: lpips-vgg, lpips-alex or digits, on `device`.

    weights: file with the LPIPS trunk's weights, where the name is an LPIPS one.
    """
    if name == "digits":
        return ConvFeatures(load_classifier(embedded("digits", "features"))).to(device)
    return LPIPS(name.removeprefix("lpips-"), weights).to(device).to(memory_format=torch.channels_last)
