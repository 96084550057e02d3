"""DINOv2 ViT-L/14 as Stein et al. (2023) use it for FD-DINOv2, by transformers.

Shapes: B images of H x W pixels, D features.
"""

import importlib.metadata
import os

import torch
from torch import Tensor, nn
from torch.nn import functional

from varpi.networks.extractors import Network, Streams, autocast_of
from varpi.networks.foreign import load_transformers
from varpi.networks.resizing import resize_like_pillow

DINOV2 = "facebook/dinov2-large"
_SIDE = 224


def load_dinov2(weights: str | os.PathLike[str] | None, device: str, precision: str) -> Network:
    network, _, sha256 = load_transformers("Dinov2Model", os.fspath(weights or DINOV2), "the dinov2 extractor")
    places = network.embeddings.position_embeddings
    side = _SIDE // network.config.patch_size
    network.embeddings.position_embeddings = nn.Parameter(_positions(places, side), requires_grad=False)
    network.to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]
    autocast = autocast_of(device, precision)
    width = network.config.hidden_size
    warnings = () if width == 1024 else (f"published FD-DINOv2 is of ViT-L/14, 1,024 features; these are {width:,}",)

    def forward(images: Tensor) -> Streams:
        pixels = (resize_like_pillow(images, _SIDE) / 255 - mean) / deviation
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
