"""The judge and the measures of the embedded digits, on networks with random weights."""

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from varpi.data import open_dataset
from varpi.data.pixels import from_uint8, to_uint8
from varpi.errors import VarpiError
from varpi.evaluation import measure, summarize
from varpi.networks.convnet import SmallConvNet, load_classifier, save_classifier
from varpi.networks.judges import embed, load_judge
from varpi.recipe import load_recipe
from varpi.weights import embedded


@pytest.fixture
def judge() -> SmallConvNet:
    return SmallConvNet((8, 16), num_classes=10).eval()


def images(n: int = 12) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32) * 2 - 1


def test_embed_is_the_network_in_any_batch_size(judge):
    quantized = from_uint8(to_uint8(images()))
    features, classes = embed(judge, quantized, batch_size=5)
    assert features.shape == (12, 16)
    torch.testing.assert_close(features, judge.embedding(quantized).detach())
    assert classes.tolist() == judge.logits(quantized).argmax(dim=1).tolist()
    assert not features.requires_grad


def test_embed_sees_what_a_saved_image_holds(judge):
    raw = images() * 1.4  # decoders overshoot [-1, 1]
    features, _ = embed(judge, raw)
    assert torch.equal(features, embed(judge, from_uint8(to_uint8(raw)))[0])
    assert torch.equal(features, embed(judge, raw.clamp(-1, 1))[0])


def test_measure_of_the_reference_itself(judge):
    reference = images(20)
    features, seen = embed(judge, reference)
    result = measure(reference, seen, judge, features)
    assert result == pytest.approx({"frechet_distance": 0, "precision": 1, "recall": 1, "class_agreement": 1}, abs=1e-9)


def test_class_agreement_is_the_share_that_agrees(judge):
    reference = images(20)
    features, seen = embed(judge, reference)
    asked = seen.clone()
    asked[:5] = (asked[:5] + 1) % 10
    assert measure(reference, asked, judge, features)["class_agreement"] == 0.75


def test_measure_of_worse_images_is_worse(judge):
    features, _ = embed(judge, images(40))
    same, other = images(40), torch.full((40, 3, 32, 32), -1.0)
    classes = torch.zeros(40, dtype=torch.int64)
    near, far = (measure(samples, classes, judge, features)["frechet_distance"] for samples in (same, other))
    assert far > 10 * near


def test_measure_refuses_classes_that_do_not_match(judge):
    with pytest.raises(VarpiError, match=r"12 samples need as many classes, shape \(12,\); got \(11,\)"):
        measure(images(), torch.zeros(11, dtype=torch.int64), judge, torch.rand(12, 16))


def test_measure_refuses_a_diverged_model(judge):
    samples = images()
    samples[3] = float("nan")
    with pytest.raises(VarpiError, match="1 of 12 images hold NaN"):
        measure(samples, torch.zeros(12, dtype=torch.int64), judge, torch.rand(12, 16))


def test_embed_refuses_nothing(judge):
    with pytest.raises(VarpiError, match="no images"):
        embed(judge, images(0))


def test_summarize_by_hand():
    summary = summarize(
        [{"precision": 0.5, "recall": 0.1}, {"precision": 0.7, "recall": 0.1}, {"precision": 0.9, "recall": 0.1}]
    )
    assert summary["precision"] == pytest.approx([0.7, 0.2])
    assert summary["recall"] == pytest.approx([0.1, 0.0])


@pytest.mark.parametrize("count", [0, 1])
def test_summarize_needs_two_seeds(count):
    with pytest.raises(VarpiError, match=f"at least 2 sampling seeds, got {count}"):
        summarize([{"recall": 0.5}] * count)


def test_summarize_refuses_different_metrics():
    with pytest.raises(VarpiError, match=r"different metrics \(in all: precision, recall\)"):
        summarize([{"recall": 0.5}, {"precision": 0.5}])


def test_classifier_round_trip(judge, tmp_path):
    path = tmp_path / "judge.safetensors"
    judge.residual = True
    save_classifier(judge, path, judge.state_dict(), {"recipe": "none"})
    loaded = load_classifier(path)
    assert loaded.channels == (8, 16)
    assert loaded.residual
    assert torch.equal(embed(loaded, (x := images()))[0], embed(judge, x)[0])
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_batch_normalization_keeps_its_statistics(tmp_path):
    network, x = SmallConvNet((8, 16), num_classes=10, norm="batch"), images()
    fresh = network.eval().logits(x)
    network.train().logits(x)
    save_classifier(network, tmp_path / "batch.safetensors", network.state_dict(), {})
    loaded = load_classifier(tmp_path / "batch.safetensors")
    assert torch.equal(loaded.logits(x), network.eval().logits(x))
    assert not torch.allclose(loaded.logits(x), fresh)


def test_the_judge_of_photographs_carries_its_recipe():
    judge = load_judge("cifar10")
    assert (judge.num_classes, sum(p.numel() for p in judge.parameters())) == (10, 843_114)
    with safe_open(embedded("cifar10", "judge"), "pt") as file:
        made_by = yaml.safe_load(file.metadata()["recipe"])
    shipped = load_recipe("cifar10-judge").model_dump(mode="json")
    assert made_by["seed"] == shipped["seed"]
    for key in ("method", "optimizer"):
        assert made_by[key].items() <= shipped[key].items(), key  # which may have newer keys
    assert made_by["data"]["split"].replace(" ", "") == shipped["data"]["split"].replace(" ", "")
    assert made_by["training"]["steps"] == shipped["training"]["steps"]


def test_load_classifier_refuses_other_files(tmp_path):
    with pytest.raises(VarpiError, match=r"missing\.safetensors"):
        load_classifier(tmp_path / "missing.safetensors")
    save_file({"other.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(VarpiError, match=r"other\.safetensors: holds no classifier"):
        load_classifier(tmp_path / "other.safetensors")


def test_judge_and_reward_are_different_networks():
    judge = load_judge()
    reward = load_classifier(embedded("digits", "perceptual"))
    assert judge.channels != reward.channels
    digits = open_dataset("digits", image_size=32, split="test")
    real = torch.stack([digits[i].image for i in range(200)])
    classes = torch.tensor([digits[i].condition for i in range(200)])
    assert (embed(judge, real)[1] == classes).float().mean() > 0.95
