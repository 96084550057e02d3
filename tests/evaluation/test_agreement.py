"""Class agreement: what was asked for, and what a judge sees, on random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from varpi.evaluation.agreement import class_agreement, classes_asked
from varpi.networks.convnet import SmallConvNet, save_classifier
from varpi.networks.extractors import Network
from varpi.networks.loading import load_extractor
from varpi.samples.reading import open_samples


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = SmallConvNet((8, 16), num_classes=10, residual=True)
    save_classifier(network, tmp_path / "judge.safetensors", network.state_dict(), {})
    return tmp_path / "judge.safetensors"


def judge(name: str, weights: Path) -> Network:
    return load_extractor(name, weights=weights)


def test_the_share_that_agrees_of_all_and_by_class(weights: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    images[20:, :, :, 1] //= 4  # so that an untrained network sees two classes at least
    np.savez(tmp_path / "samples.npz", arr_0=images)
    seen = judge("cifar10", weights)(torch.from_numpy(images).permute(0, 3, 1, 2))["logits"].argmax(dim=1)
    asked = seen.clone()
    asked[:10] = (asked[:10] + 1) % 10
    agreement, by_class = class_agreement(
        open_samples(tmp_path / "samples.npz"), asked.tolist(), judge("cifar10", weights), batch_size=16
    )
    assert agreement == 0.75
    assert by_class == {
        str(label): (seen == asked)[asked == label].double().mean().item() for label in asked.unique().tolist()
    }
    assert len(by_class) > 1


def test_what_was_asked_for_is_known_in_the_judges_own_classes_only(weights: Path) -> None:
    photographs, digits = judge("cifar10", weights), judge("digits", weights)
    for network in (photographs, digits):
        assert classes_asked(None, network) is None
        assert classes_asked({"classes": [0, 9, 3]}, network) == [0, 9, 3]
        assert classes_asked({"classes": [0, 207]}, network) is None  # a generator of ImageNet
    said = {"prompts": ["a handwritten seven", "a two"]}
    assert classes_asked(said, digits) == [7, 2]
    assert classes_asked(said, photographs) is None
    assert classes_asked({"prompts": ["a seven", "a dog"]}, digits) is None
