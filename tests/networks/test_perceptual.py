"""LPIPS against the lpips package itself; the offline distance by hand."""

import copy
import warnings
from pathlib import Path
from urllib.error import URLError

import lpips
import pytest
import torch

from varpi.errors import VarpiError
from varpi.networks.convnet import SmallConvNet
from varpi.networks.perceptual import LPIPS, ConvPerceptual


def package_with_random_trunk(net: str) -> lpips.LPIPS:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)


def save_trunk(package: lpips.LPIPS, path: Path) -> Path:
    """The trunk under torchvision's names, with a classifier row as in the real file."""
    state = {f"features.{name.split('.', 1)[1]}": value for name, value in package.net.state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(3)}, path)
    return path


@pytest.fixture(scope="module", params=["vgg", "alex"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LPIPS, lpips.LPIPS]:
    theirs = package_with_random_trunk(request.param)
    path = save_trunk(theirs, tmp_path_factory.mktemp("weights") / "trunk.pth")
    return LPIPS(request.param, path), theirs


def test_equals_the_package(pair: tuple[LPIPS, lpips.LPIPS]):
    ours, theirs = pair
    a, b = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(3, 3, 64, 64) * 2 - 1
    expected = theirs(a, b).flatten()
    distance = ours.distance(ours.maps(a), ours.maps(b))
    assert distance.shape == (3,)
    assert torch.allclose(distance, expected, rtol=1e-4)
    assert distance.min() > 0


def test_one_reference_serves_consecutive_images(pair: tuple[LPIPS, lpips.LPIPS]):
    ours, _ = pair
    samples, targets = torch.rand(4, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    shared = ours.distance(ours.maps(samples), ours.maps(targets))
    repeated = ours.distance(ours.maps(samples), ours.maps(targets.repeat_interleave(2, dim=0)))
    assert torch.allclose(shared, repeated, rtol=1e-5)
    with pytest.raises(VarpiError, match="3 images are no multiple of 2 references"):
        ours.distance(ours.maps(samples[:3]), ours.maps(targets))


def test_bfloat16_autocast_and_channels_last_agree(pair: tuple[LPIPS, lpips.LPIPS]):
    ours, _ = pair
    a, b = torch.rand(4, 3, 64, 64) * 2 - 1, torch.rand(4, 3, 64, 64) * 2 - 1
    exact = ours.distance(ours.maps(a), ours.maps(b))
    last = [x.to(memory_format=torch.channels_last) for x in (a, b)]
    assert torch.allclose(ours.distance(*(ours.maps(x) for x in last)), exact, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        maps = [ours.maps(x) for x in last]
        rough = ours.distance(*maps)
    assert maps[0][0].dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=0.03)


def test_is_frozen_but_lets_gradients_reach_the_image(pair: tuple[LPIPS, lpips.LPIPS]):
    ours, _ = pair
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    image = (torch.rand(1, 3, 64, 64) * 2 - 1).requires_grad_()
    target = torch.zeros(1, 3, 64, 64)
    ours.distance(ours.maps(image), ours.maps(target)).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0


def test_building_it_leaves_the_random_stream_alone(tmp_path: Path):
    path = save_trunk(package_with_random_trunk("alex"), tmp_path / "trunk.pth")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    LPIPS("alex", path)
    assert torch.equal(torch.rand(4), expected)


def test_weights_in_the_hub_cache_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = package_with_random_trunk("alex")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    save_trunk(theirs, tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    ours = LPIPS("alex")
    assert torch.equal(ours.trunk.state_dict()["slice1.0.weight"], theirs.net.state_dict()["slice1.0.weight"])


def test_offline_without_weights_the_error_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*_args: object, **_kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(VarpiError) as caught:
        LPIPS("alex")
    message = str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth") in message
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth cannot be downloaded" in message
    assert "put that file there" in message
    assert "\n" not in message


def test_bad_weights_files_are_named(tmp_path: Path):
    with pytest.raises(VarpiError, match=r"there is no weights file .*absent\.pth"):
        LPIPS("alex", tmp_path / "absent.pth")
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not a whole file")
    with pytest.raises(VarpiError, match=r"cut\.pth does not hold torchvision's weights of the alex network"):
        LPIPS("alex", tmp_path / "cut.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(VarpiError, match=r"other\.pth does not hold .*\(KeyError\)"):
        LPIPS("alex", tmp_path / "other.pth")
    with pytest.raises(VarpiError, match="unknown network 'resnet'; expected one of vgg, alex"):
        LPIPS("resnet")


def test_conv_distance_by_hand():
    """Two layers of one position: orthogonal unit vectors are 2 apart, equal directions 0; the mean is 1."""
    perceptual = ConvPerceptual(SmallConvNet((8,), 2))
    right, up = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    maps = [vector.reshape(1, 2, 1, 1) for vector in (right, up, 2 * right)]
    assert perceptual.distance([maps[0], maps[0]], [maps[1], maps[2]]).tolist() == pytest.approx([1.0])
    # A zero vector has no direction and no gradient trouble.
    zero = torch.zeros(1, 2, 1, 1, requires_grad=True)
    distance = perceptual.distance([zero], [maps[0]])
    assert distance.tolist() == pytest.approx([1.0])
    distance.sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_conv_distance_separates_images_and_freeze_the_network():
    network = SmallConvNet((8, 16), 3)
    perceptual = ConvPerceptual(network)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    maps = perceptual.maps(images)
    assert perceptual.distance(maps, maps).tolist() == [0.0] * 4
    assert (perceptual.distance(maps, [one.flip(0) for one in maps]) > 0).all()
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_error_maps_add_up_to_the_distance(pair: tuple[LPIPS, lpips.LPIPS]):
    ours, _ = pair
    small = ConvPerceptual(SmallConvNet((8, 16)))
    a, b = torch.rand(4, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    for network in (ours, small):
        left, right = network.maps(a), network.maps(b)
        maps = network.error_maps(left, right)
        assert [layer.shape for layer in maps] == [(4, *layer.shape[2:]) for layer in left]
        total = torch.stack([layer.mean(dim=(1, 2)) for layer in maps]).sum(dim=0)
        torch.testing.assert_close(total, network.distance(left, right))


def test_a_lowered_trunk_is_near_the_exact_one(pair: tuple[LPIPS, lpips.LPIPS]):
    ours = copy.deepcopy(pair[0])
    a, b = torch.rand(4, 3, 64, 64) * 2 - 1, torch.rand(4, 3, 64, 64) * 2 - 1
    exact = ours.distance(ours.maps(a), ours.maps(b))
    ours.lower()
    maps = ours.maps(a)
    assert maps[0].dtype == torch.bfloat16
    rough = ours.distance(maps, ours.maps(b))
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=0.03)
