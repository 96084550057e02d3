"""Files in LlamaGen's own format through the recipe of the paper's main result, and out again under their old keys."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torchvision
from training_runs import numbers

from varpi.cli.main import main
from varpi.generators import LlamaGenConfig
from varpi.tokenizers import VQConfig
from varpi.weights import export_original

LAYERS = {"layers.0.attention.wqkv.weight", "layers.1.feed_forward.w3.weight", "norm.weight", "output.weight"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.photographs(tmp_path_factory.mktemp("photographs"), ((500, 375), (375, 500), (600, 800), (200, 300)))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16 as torchvision names its tensors, with random weights: for what LPIPS says, not for what it means."""
    path = tmp_path_factory.mktemp("trunk") / "vgg16.pth"
    torch.manual_seed(0)
    features = torchvision.models.vgg16().features.state_dict()
    torch.save({f"features.{name}": tensor for name, tensor in features.items()}, path)
    return path


def train_and_export(
    folder: Path, photographs: Path, trunk: Path, fields: dict[str, Any], tokenizer: VQConfig, *settings: str
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The tensors that went in, those that came out, and the log."""
    config = LlamaGenConfig(grid=24, **fields)  # 384 pixels, 16 to a token
    export_original(tiny.generator(config), folder / "c2i_tiny_384.pt")
    export_original(tiny.tokenizer(tokenizer), folder / "vq_ds16_c2i.pt")
    assert set(torch.load(folder / "vq_ds16_c2i.pt", weights_only=True)) == {"model"}
    command = ["train", "llamagen-c2i-xxl", "--output", str(folder / "run"), "--device", "cpu"]
    for setting in (
        f"generator.source={folder / 'c2i_tiny_384.pt'}",
        f"generator.architecture={dict(fields, grid=24)}",
        f"tokenizer.source={folder / 'vq_ds16_c2i.pt'}",
        f"data.source={photographs}",
        "data.workers=1",
        f"method.reward.perceptual_weights={trunk}",
        "method.group_size=2",
        "training.steps=2",
        "validation=null",
        *settings,
    ):
        command += ["--set", setting]
    assert main(command) == 0
    assert main(["export", str(folder / "run"), "--output", str(folder / "tuned.pt")]) == 0
    before, after = (torch.load(folder / name, weights_only=True) for name in ("c2i_tiny_384.pt", "tuned.pt"))
    return before, after, numbers(folder / "run")


def check(before: dict[str, Any], after: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    assert before.keys() == after.keys() >= LAYERS
    for name, tensor in after.items():
        assert tensor.shape == before[name].shape
        assert tensor.dtype == torch.float32
        assert 0 < (tensor - before[name]).abs().max() < 1e-5  # two updates at the paper's rate of 1e-6
    for row in rows:
        assert row["ratio_mean"] == 1.0
        assert row["mse"] > 0
        assert row["perceptual"] > 0
        assert row["reward_mean"] == pytest.approx(-row["mse"] - row["perceptual"], rel=1e-5)
        assert row["gradient_norm"] > 0
    assert [row["step"] for row in rows] == [1, 2]


def test_photographs_at_384_through_a_narrow_vq16(tmp_path: Path, photographs: Path, trunk: Path) -> None:
    fields = {"dim": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}
    vq: dict[str, Any] = {"channels": 8, "latent_channels": 16, "codebook_size": 64, "norm_groups": 4}
    check(
        *train_and_export(
            tmp_path,
            photographs,
            trunk,
            fields,
            VQConfig(**vq),
            f"tokenizer.architecture={vq}",
            "training.batch_size=1",
            "method.condition_drop=0.5",
        )
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_photographs_at_384_through_vq16_itself(tmp_path: Path, photographs: Path, trunk: Path) -> None:
    fields = {"dim": 64, "n_layer": 2, "n_head": 2}
    check(*train_and_export(tmp_path, photographs, trunk, fields, VQConfig(), "training.batch_size=2"))
