"""Perceptual distances: an image's maps are computed once and compared many times.

n images on the left of a distance, m on the right, C channels of a map.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.networks.convnet import SmallConvNet
from varpi.runtime.sizes import sizes_only

NETS = ("vgg", "alex")


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity, version 0.1, frozen (the L_p of VA-π's reward).

    The trunks and the calibrated layer weights are those of the `lpips` package, whose own call computes both images'
    maps every time, and which makes a classifier of half a gigabyte to leave it out. Works under autocast: the trunk
    then runs in the low precision, the distance in float32.

    Args:
        net: "vgg" (VGG16, the paper's) or "alex" (AlexNet).
        weights: file with torchvision's ImageNet weights of that network. None: the file in torch hub's cache, which is
            downloaded when it is not there.

    Raises:
        VarpiError: unknown net; a weights file that is missing, unreadable or of another network; no file and no
            connection.
    """

    def __init__(self, net: str = "vgg", weights: str | Path | None = None) -> None:
        super().__init__()
        if net not in NETS:
            raise VarpiError(f"LPIPS: unknown network {net!r}; expected one of {', '.join(NETS)}")
        import lpips  # here, for it brings torchvision, which takes a second that most uses need not spend

        make = {"vgg": lpips.pn.vgg16, "alex": lpips.pn.alexnet}[net]
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision in a way that warns
            trunk = make(pretrained=False)
        self.trunk = trunk.to_empty(device="cpu")
        if not sizes_only():
            _load_trunk(self.trunk, net, weights)
        self.scaling_layer = lpips.ScalingLayer()
        calibrated = torch.load(
            Path(lpips.__file__).with_name("weights") / "v0.1" / f"{net}.pth", map_location="cpu", weights_only=True
        )
        self.layer_weights = nn.ParameterList(calibrated[name].flatten() for name in sorted(calibrated))
        self.eval().requires_grad_(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Five maps of the trunk, after the last ReLU of each resolution: images (n,3,H,W) in [-1,1] -> [(n,C,h,w)]."""
        return list(self.trunk(self.scaling_layer(images).to(next(self.trunk.parameters()).dtype)))

    def lower(self) -> None:
        """Hold the trunk in bfloat16; the distance stays in float32."""
        self.trunk.to(torch.bfloat16)

    def distance(self, maps: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """float32 (n,), >= 0, from maps of n images and of m references; see Perceptual.distance."""
        layers = zip(maps, reference, self.layer_weights, strict=True)
        # A product and a sum, not a matrix product, which autocast would round to the low precision.
        return torch.stack([(_means(a, b) * weight.float()).sum(dim=1) for a, b, weight in layers]).sum(dim=0)

    def error_maps(self, maps: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor]:
        """float32 [(n,h,w)], whose spatial means add up to the distance; see Perceptual.error_maps."""
        layers = zip(maps, reference, self.layer_weights, strict=True)
        return [(_unit_difference(a, b) * weight.float()[:, None, None]).sum(dim=1) for a, b, weight in layers]


class ConvPerceptual(nn.Module):
    """Perceptual distance on the maps of a trained SmallConvNet, frozen: the embedded default's reward.

    As LPIPS without calibrated weights: unit-normalized maps, squared difference summed over channels, mean over
    space, mean over layers.

    Args:
        network: the trained network; its parameters are frozen.
    """

    def __init__(self, network: SmallConvNet) -> None:
        super().__init__()
        self.network = network
        self.eval().requires_grad_(False)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The network's maps: images (n,3,H,W) in [-1,1] -> [(n,C,h,w)]."""
        return self.network.maps(images)

    def distance(self, maps: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """float32 (n,) in [0,2], from maps of n images and of m references; see Perceptual.distance."""
        layers = zip(maps, reference, strict=True)
        return torch.stack([_means(a, b).sum(dim=1) for a, b in layers]).mean(dim=0)

    def error_maps(self, maps: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor]:
        """float32 [(n,h,w)], whose spatial means add up to the distance; see Perceptual.error_maps."""
        layers = zip(maps, reference, strict=True)
        return [_unit_difference(a, b).sum(dim=1) / len(maps) for a, b in layers]


def _means(maps: Tensor, reference: Tensor) -> Tensor:
    """Spatial means of `_unit_difference`: float32 (n,C)."""
    return _unit_difference(maps, reference).mean(dim=(2, 3))


def _unit_difference(maps: Tensor, reference: Tensor) -> Tensor:
    """The squared difference of unit vectors, per channel: (n,C,h,w), (m,C,h,w) -> float32 (n,C,h,w)."""
    count = reference.shape[0]
    if maps.shape[0] % count:
        raise VarpiError(f"perceptual distance: {maps.shape[0]} images are no multiple of {count} references")
    left, right = _unit(maps).unflatten(0, (count, -1)), _unit(reference).unsqueeze(1)
    difference = (left - right).square() if torch.is_grad_enabled() else left.sub_(right).square_()
    return difference.flatten(0, 1)


def _unit(maps: Tensor) -> Tensor:
    """In float32, each position's channel vector divided by its length; a zero vector stays zero."""
    values = maps.float()
    lengths = torch.linalg.vector_norm(values, dim=1, keepdim=True) + 1e-10
    return values / lengths if torch.is_grad_enabled() or values is maps else values.div_(lengths)


def trunk_url(net: str) -> str:
    """Where torchvision keeps the ImageNet weights of a network's trunk."""
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    return (VGG16_Weights.IMAGENET1K_V1 if net == "vgg" else AlexNet_Weights.IMAGENET1K_V1).url


def cached_trunk(net: str) -> Path:
    """Where torch hub's cache keeps that file, whether it is there or not."""
    return Path(torch.hub.get_dir(), "checkpoints", trunk_url(net).rsplit("/", 1)[1])


def _load_trunk(trunk: nn.Module, net: str, weights: str | Path | None) -> None:
    """Fill the package's sliced network (slice2.5.weight) from torchvision's weights (features.5.weight)."""
    url = trunk_url(net)
    path = cached_trunk(net) if weights is None else Path(weights)
    if weights is None and not path.is_file():
        try:
            torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True)
        except (OSError, RuntimeError) as error:
            raise VarpiError(
                f"LPIPS: the {net} weights are not at {path} and {url} cannot be downloaded ({error}); "
                f"put that file there, or name a copy of it as the weights"
            ) from error
    if not path.is_file():
        raise VarpiError(f"LPIPS: there is no weights file {path}; torchvision's file is at {url}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        trunk.load_state_dict({name: state[f"features.{name.split('.', 1)[1]}"] for name in trunk.state_dict()})
    except Exception as error:
        # A truncated file, a pickle of other things, missing or misshapen tensors: to the user all one cause.
        raise VarpiError(
            f"LPIPS: {path} does not hold torchvision's weights of the {net} network "
            f"({type(error).__name__}); expected the file at {url}"
        ) from error
