"""From an encoded image to a tensor: decoding, the ADM centre crop, scaling to [-1, 1]."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from varpi.data.dataset import BadImage, Dropped

# A strip of 1x10000 pixels is a file gone wrong, and would swell to gigabytes when its short side is scaled up.
_MAX_ASPECT_RATIO = 100


def load_image(source: Path | bytes, name: str, image_size: int, *, min_side: int = 0) -> Tensor:
    """Decode one image, of whatever color mode, and crop it to float32 (3, image_size, image_size) in [-1, 1].

    Args:
        source: a file, or the bytes of one.
        name: what to call it in an error.
        image_size: side of the result in pixels.
        min_side: the shorter side that an image must have at least, in pixels.

    Raises:
        Dropped: the image is smaller; its header says so, and nothing is decoded.
        BadImage: the file is missing, truncated or no image, or longer than wide beyond all use.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            if min(opened.size) < min_side:
                raise Dropped(f"{name}: {opened.width}x{opened.height} pixels; the shorter side must have {min_side}")
            image = to_rgb(opened)
    except Dropped:
        raise
    except Exception as error:  # decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error, …
        reason = str(error) or type(error).__name__
        # Pillow puts the address of the buffer into this message
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else reason.splitlines()[0]
        raise BadImage(f"{name}: unreadable image ({reason})") from error
    if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
        raise BadImage(f"{name}: {image.width}x{image.height} pixels are too narrow for a square crop")
    return to_tensor(center_crop(image, image_size))


def to_rgb(image: Image.Image) -> Image.Image:
    """Grayscale (8 or 16 bits), palette, CMYK, RGBA, … to RGB. Alpha is dropped, as in the original loaders.

    Raises:
        ValueError: a mode whose range is unknown (floating-point TIFF).
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255, which leaves a white image
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about palettes with transparency otherwise
    return image.convert("RGB")


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
