"""From a decoded image to a tensor: the ADM centre crop, scaling to [-1, 1]."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varpi.data.dataset import BadImage
from varpi.data.images import MAX_PIXELS, decode

# A strip of 1x10000 pixels is a file gone wrong, and would swell to gigabytes when its short side is scaled up.
_MAX_ASPECT_RATIO = 100


def load_image(
    source: Path | bytes, name: str, image_size: int, *, min_side: int = 0, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Decode one image, as `decode` does, and crop it to float32 (3, image_size, image_size) in [-1, 1].

    Raises:
        Dropped, BadImage: as `decode`, and for an image longer than wide beyond all use.
    """
    image = decode(source, name, min_side=min_side, max_pixels=max_pixels)
    if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        raise BadImage(f"{name}: {image.width}x{image.height} pixels are too narrow for a square crop")
    return to_tensor(center_crop(image, image_size))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to `size` x `size` pixels (Dhariwal & Nichol 2021), as LlamaGen and VA-π use it.

    The image is halved with a box filter while its short side is at least twice `size`, then scaled (bicubic; up, if
    it is smaller) until the short side is `size`, and the middle is cut out.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 (3, H, W); the bytes 0…255 map to [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.float() / 255 * 2 - 1
