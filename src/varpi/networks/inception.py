"""The Inception of 2015-12-05, which FID is defined on (Heusel et al. 2017), by torch-fidelity.

Shapes: B images of H x W pixels.
"""

import importlib.metadata
import io
import os
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from varpi.errors import VarpiError
from varpi.networks.extractors import Network, Streams, autocast_of
from varpi.runtime.files import line
from varpi.runtime.sources import find
from varpi.runtime.tensors import fill, read_checkpoint, sha256_of

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_INCEPTION_SHA256 = "6726825d"  # the first digits, which torch hub's convention puts into the file's name
_SPATIAL_CHANNELS = 7


def load_inception(weights: str | os.PathLike[str] | None, device: str, precision: str) -> Network:
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
    autocast = autocast_of(device, precision)

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


def cached_inception() -> Path:
    """Where torch hub's cache keeps the published weights, whether they are there or not."""
    return Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)


def _inception_file() -> Path:
    """The published weights in torch hub's cache, downloaded when they are not there yet."""
    path = cached_inception()
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
