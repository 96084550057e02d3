"""Pixels as tensors and as bytes.

Shapes: B images of H x W pixels. Tensors are float (B,3,H,W) in [-1,1], arrays are uint8 (B,H,W,3).
"""

import numpy as np
import torch

from varpi.errors import VarpiError


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Quantize images (B,3,H,W), nominally in [-1,1], to uint8 (B,H,W,3): clamp(127.5 x + 128, 0, 255), truncated.

    That is the formula of the LlamaGen and VA-π samplers. Raises VarpiError for another shape or non-finite pixels.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise VarpiError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
    bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
    if bad:
        raise VarpiError(f"{bad} of {len(images)} images hold NaN or infinity; the model that made them diverged")
    pixels = torch.clamp(127.5 * images.detach().float() + 128.0, 0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous().numpy()


def from_uint8(images: np.ndarray) -> torch.Tensor:
    """The way back from `to_uint8`: uint8 (B,H,W,3) to float32 (B,3,H,W) in [-1,1]; quantizing again changes nothing.

    Raises VarpiError for another shape or dtype.
    """
    check_bytes(images, "images")
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def check_bytes(images: np.ndarray, name: str) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or images.size == 0:
        raise VarpiError(f"{name}: expected uint8 of shape (B, H, W, 3), got {images.dtype} {images.shape}")
