"""Networks that see images for an evaluation, under one protocol: Inception, DINOv2, and the judge of the digits.

Shapes: B images of H x W pixels, D features.
"""

import importlib.metadata
import io
import os
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from varpi.errors import VarpiError
from varpi.networks.classifier import load_classifier
from varpi.networks.detectors import load_transformers
from varpi.networks.judge import load_judge
from varpi.runtime.files import line
from varpi.runtime.tensors import embedded, fill, find, read_checkpoint, sha256_of

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_INCEPTION_SHA256 = "6726825d"  # the first digits, which torch hub's convention puts into the file's name
DINOV2 = "facebook/dinov2-large"
PRECISIONS = ("fp32", "bf16")
_SPATIAL_CHANNELS = 7

Streams = dict[str, Tensor]


class FeatureExtractor(Protocol):
    """What an evaluation asks of a network."""

    @property
    def name(self) -> str:
        """Names the metrics: on "inception" the Fréchet distance is FID."""
        ...

    @property
    def identity(self) -> Mapping[str, str]:
        """Everything that moves its outputs: name, sha256 of the weights, precision, software, preprocessing."""
        ...

    @property
    def streams(self) -> Mapping[str, int]:
        """What it gives for an image: a name and a width each. "pool" is always there; see `load_extractor`."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What a reader of its numbers should know, a line each."""
        ...

    def __call__(self, images: Tensor) -> Streams:
        """The streams of uint8 images (B,3,H,W), float32 (B,D) each, on any device."""
        ...


@dataclass(frozen=True)
class Network:
    """A frozen network as a `FeatureExtractor`."""

    name: str
    identity: Mapping[str, str]
    streams: Mapping[str, int]
    device: str
    forward: Callable[[Tensor], Streams]
    """From uint8 images (B,3,H,W) on `device`."""
    warnings: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Streams:
        """Raises VarpiError for anything but uint8 images (B,3,H,W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise VarpiError(
                f"{self.name}: expected uint8 images of shape (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        # By default cuDNN rounds the factors of float32 convolutions to 10 bits and may sum in another order each time.
        exact = torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=False,
            deterministic=True,
            allow_tf32=False,
            fp32_precision="ieee",
        )
        with torch.inference_mode(), exact:
            return {name: stream.float() for name, stream in self.forward(images.to(self.device)).items()}


def load_extractor(
    name: str, *, weights: str | os.PathLike[str] | None = None, device: str = "cpu", precision: str = "fp32"
) -> Network:
    """The network that an evaluation names.

    name: one of
        "inception", the Inception of 2015-12-05 that FID is defined on (Heusel et al. 2017), by torch-fidelity: streams
            "pool" (2048); "spatial" (2023), which sFID is computed on (Nash et al. 2021), 7 channels of a 17x17 map in
            the ADM evaluator's order; and "logits" (1008), without the bias, as the Inception Score has them;
        "dinov2", DINOv2 ViT-L/14 as Stein et al. (2023) use it for FD-DINOv2: stream "pool" (1024), the class token;
        "digits", the embedded judge of 32x32 digits: streams "pool" and "logits" (10).
    weights: a file; for "dinov2" also a directory of transformers or a Hub id, for other sizes of it. By default
        Inception's are torch hub's, downloaded when its cache lacks them, and DINOv2's facebook/dinov2-large.
    precision: "fp32", or "bf16" for a network in bfloat16 (resizing, pooling and logits stay in float32), which is
        faster and another evaluator: its numbers are compared with its own only.

    Raises:
        VarpiError: no such network or precision, or its weights are not here, damaged or of another network.
    """
    if name not in _LOADERS:
        raise VarpiError(f"no feature extractor {name!r}; there are {', '.join(_LOADERS)}")
    if precision not in PRECISIONS:
        raise VarpiError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    return _LOADERS[name](weights, device, precision)


# -- Inception


def _load_inception(weights: str | os.PathLike[str] | None, device: str, precision: str) -> Network:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3
    except ImportError as error:
        raise VarpiError("the inception extractor needs: pip install 'varpi[evaluation]'") from error

    class Unfilled(FeatureExtractorInceptionV3):
        """Its constructor would unpickle whatever a file holds; ours gets none, and is filled afterwards."""

        def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.device("meta"):
        network: Any = Unfilled("inception", ["2048"], feature_extractor_weights_path=nothing)
    path = _inception_file() if weights is None else find(weights)
    tensors = read_checkpoint(path).tensors
    for counter in (key for key in network.state_dict() if key.endswith("num_batches_tracked")):
        tensors.setdefault(counter, torch.zeros((), dtype=torch.int64))  # of no use here, and older files lack it
    fill(network, tensors, str, str(path), "torch-fidelity's Inception", device, torch.float32)
    blocks: list[Any] = [module for module in network.modules() if isinstance(module, BasicConv2d)]
    for block in blocks:
        block.conv = nn.utils.fuse_conv_bn_eval(block.conv, block.bn)
        block.bn = nn.Identity()
    network.to(memory_format=torch.channels_last)
    early = nn.Sequential(
        network.Conv2d_1a_3x3,
        network.Conv2d_2a_3x3,
        network.Conv2d_2b_3x3,
        network.MaxPool_1,
        network.Conv2d_3b_1x1,
        network.Conv2d_4a_3x3,
        network.MaxPool_2,
        network.Mixed_5b,
        network.Mixed_5c,
        network.Mixed_5d,
        network.Mixed_6a,
        network.Mixed_6b,
        network.Mixed_6c,
    )
    late = nn.Sequential(network.Mixed_6d, network.Mixed_6e, network.Mixed_7a, network.Mixed_7b, network.Mixed_7c)
    autocast = _autocast(device, precision)

    def forward(images: Tensor) -> Streams:
        pixels = (_resize_like_tensorflow(images.float(), network.INPUT_IMAGE_SIZE) - 128) / 128
        with autocast:
            hidden = early(pixels.contiguous(memory_format=torch.channels_last))
            spatial = network.Mixed_6d.branch1x1(hidden)[:, :_SPATIAL_CHANNELS]
            hidden = late(hidden)
        pool = hidden.float().mean(dim=(2, 3))
        # ADM's arrays are channels-last when it flattens them.
        return {
            "pool": pool,
            "spatial": spatial.permute(0, 2, 3, 1).flatten(1),
            "logits": pool @ network.fc.weight.T,
        }

    sha256 = sha256_of(path)
    warnings = ()
    if not sha256.startswith(_INCEPTION_SHA256):
        warnings = (
            f"the Inception weights (sha256 {sha256[:8]}…) are not the published ones ({_INCEPTION_SHA256}…): "
            "no published number compares with these",
        )
    return Network(
        "inception",
        {
            "name": "inception",
            "weights_sha256": sha256,
            "precision": precision,
            "software": f"torch-fidelity {importlib.metadata.version('torch-fidelity')}",
            "preprocessing": "bilinear to 299x299 as in TensorFlow 1 (corners at pixel corners), (x - 128) / 128",
        },
        {"pool": 2048, "spatial": 17 * 17 * _SPATIAL_CHANNELS, "logits": 1008},
        device,
        forward,
        warnings,
    )


def _inception_file() -> Path:
    """The published weights in torch hub's cache, downloaded when they are not there yet."""
    path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=_INCEPTION_SHA256, progress=False)
        except (urllib.error.URLError, OSError, RuntimeError) as error:
            raise VarpiError(
                f"{path}: Inception's weights are not there and cannot be downloaded ({line(error)}); fetch "
                f"{INCEPTION_URL} where there is a network and put it there, or name its place (weights, --weights)"
            ) from error
    return path


def _resize_like_tensorflow(images: Tensor, size: int) -> Tensor:
    """Bilinear resize (B,3,H,W) -> (B,3,size,size) as TensorFlow 1 has it: pixel i looks at i * H / size, no antialias.

    As two matrix products, which is exact to rounding and faster than gathering four neighbours of every pixel.
    """
    rows, columns = (_interpolation(length, size, images.device) for length in images.shape[2:])
    return rows @ images @ columns.T


def _interpolation(length: int, size: int, device: torch.device) -> Tensor:
    """float32 (size, length): the weight of each old position in each new one."""
    position = torch.arange(size, device=device) * torch.tensor(length / size, dtype=torch.float32)
    low = position.long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    weight = (position - low)[:, None]
    one = functional.one_hot
    return one(low, length) * (1 - weight) + one(high, length) * weight


# -- DINOv2

_DINOV2_SIDE = 224


def _load_dinov2(weights: str | os.PathLike[str] | None, device: str, precision: str) -> Network:
    network, _, sha256 = load_transformers("Dinov2Model", os.fspath(weights or DINOV2), "the dinov2 extractor")
    places = network.embeddings.position_embeddings
    side = _DINOV2_SIDE // network.config.patch_size
    network.embeddings.position_embeddings = nn.Parameter(_positions(places, side), requires_grad=False)
    network.to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]
    autocast = _autocast(device, precision)
    width = network.config.hidden_size
    warnings = () if width == 1024 else (f"published FD-DINOv2 is of ViT-L/14, 1,024 features; these are {width:,}",)

    def forward(images: Tensor) -> Streams:
        pixels = (_resize_like_pillow(images, _DINOV2_SIDE) / 255 - mean) / deviation
        with autocast:
            return {"pool": network(pixel_values=pixels).last_hidden_state[:, 0]}

    return Network(
        "dinov2",
        {
            "name": "dinov2",
            "weights_sha256": sha256,
            "precision": precision,
            "software": f"transformers {importlib.metadata.version('transformers')}",
            "preprocessing": "bicubic to 224x224 with antialiasing, rounded to bytes, ImageNet's mean and deviation; "
            "the normalized class token; position embeddings resampled as in the original code",
        },
        {"pool": width},
        device,
        forward,
        warnings,
    )


def _positions(embeddings: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n*n, D) for a grid of `side`, as the original DINOv2 resamples them.

    It scales by (side + 0.1) / n, where transformers scales by side / n, which moves every position by up to a quarter
    of one.
    """
    first, grid = embeddings[:, :1], embeddings[:, 1:]
    n = round(grid.shape[1] ** 0.5)
    if n == side:
        return embeddings
    grid = grid.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([first, grid.flatten(2).mT], dim=1)


def _resize_like_pillow(images: Tensor, size: int) -> Tensor:
    """Bicubic resize of uint8 (B,3,H,W) to whole values in [0, 255], within one of Pillow's: float32.

    Pillow resizes the rows, rounds and clips, and then the columns likewise.
    """
    resized = images.float()
    for shape in ((images.shape[2], size), (size, size)):
        if resized.shape[2:] != shape:
            resized = functional.interpolate(resized, shape, mode="bicubic", antialias=True, align_corners=False)
            resized = resized.round().clamp(0, 255)
    return resized


# -- the judge of the digits


def _load_digits(weights: str | os.PathLike[str] | None, device: str, precision: str) -> Network:
    path = embedded("digits", "judge") if weights is None else Path(weights)
    judge = load_judge(device) if weights is None else load_classifier(path, device)
    autocast = _autocast(device, precision)

    def forward(images: Tensor) -> Streams:
        if images.shape[2:] != (32, 32):
            raise VarpiError(f"images of {images.shape[3]}x{images.shape[2]} pixels; the judge knows 32x32 digits")
        with autocast:
            pool = judge.embedding(images.float() / 127.5 - 1).float()
        return {"pool": pool, "logits": judge.head(pool)}

    return Network(
        "digits",
        {
            "name": "digits",
            "weights_sha256": sha256_of(path),
            "precision": precision,
            "software": "varpi's SmallConvNet",
            "preprocessing": "x / 127.5 - 1",
        },
        {"pool": judge.channels[-1], "logits": judge.num_classes},
        device,
        forward,
    )


def _autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


_LOADERS: dict[str, Callable[[str | os.PathLike[str] | None, str, str], Network]] = {
    "inception": _load_inception,
    "dinov2": _load_dinov2,
    "digits": _load_digits,
}
