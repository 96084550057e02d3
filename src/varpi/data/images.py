"""The one decoder of images, for every route by which varpi reads them: training, evaluation, sample sets.

What it does, whatever the route:

- Only `FORMATS` are read, told by the content and not by the name; of several frames or pages the first.
- An image of more than `MAX_PIXELS` pixels, by its header, is refused before it is decoded.
- The orientation in EXIF (or XMP) is applied, as viewers do. Metadata that cannot be read leave the image as stored.
- Grayscale is repeated, palettes are looked up, CMYK and other colour spaces are converted without their ICC profile.
- 16 bits become 8 by the high byte. Floating-point and 32-bit pixels have no known range and are refused.
- Alpha is composited on white.
- A file whose pixels are cut short is refused, not filled up with gray.
"""

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from varpi.data.dataset import TOO_SMALL, BadImage, Dropped
from varpi.runtime.files import open_regular

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
"""What is decoded, by Pillow's name, and how such files are called."""
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_PIXELS = 100_000_000
"""Width times height of the largest image that is decoded unless a caller says less: 300 MB as RGB."""
_MAX_BYTES = 1 << 30  # no image of MAX_PIXELS is larger, however it is stored

# Of damaged metadata, and of sizes that are checked here anyway; a warning per image would drown the rest
warnings.filterwarnings("ignore", module=r"PIL\.")


def has_image_suffix(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def decode(source: Path | bytes, name: str, *, min_side: int = 0, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image to RGB, by the rules above.

    Args:
        source: a file, or the bytes of one.
        name: what to call it in an error.
        min_side: the shorter side that an image must have at least, in pixels.
        max_pixels: width times height of the largest image that is decoded.

    Raises:
        Dropped: the image is smaller; its header says so, and nothing is decoded.
        BadImage: it is missing, no regular file, cut short, too large, or none of `FORMATS`.
    """
    try:
        with _opened(source) as file, Image.open(file, formats=list(FORMATS)) as image:
            _check_size(image, name, min_side, max_pixels)
            image.load()
            return _to_rgb(_upright(image))
    except (BadImage, Dropped):
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"{name}: unreadable image (none of {', '.join(FORMATS)})") from error
    except Exception as error:  # decoders of broken files raise nearly anything: OSError, SyntaxError, struct.error, …
        reason = str(error).splitlines()
        raise BadImage(f"{name}: unreadable image ({reason[0] if reason else type(error).__name__})") from error


def _opened(source: Path | bytes) -> BinaryIO:
    file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
    if file.seek(0, io.SEEK_END) > _MAX_BYTES:
        file.close()
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    file.seek(0)
    return file


def _check_size(image: Image.Image, name: str, min_side: int, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"{name}: {width}x{height} pixels are more than {max_pixels}, the most that is decoded")
    if min(width, height) < min_side:
        raise Dropped(f"{name}: {width}x{height} pixels; the shorter side must have {min_side}", TOO_SMALL)


def _upright(image: Image.Image) -> Image.Image:
    """The image as its metadata say it should be seen. Pillow has done so already where TIFF says it."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged metadata raise nearly anything, and are no fault of the pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    transparent = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image)
        if image.mode == "F" or wide.min() < 0 or wide.max() > 0xFFFF:
            raise ValueError(f"pixels of mode {image.mode!r} have no known range")
        image = Image.fromarray((wide >> 8).astype(np.uint8))  # Pillow's own conversion would clip at 255
        if isinstance(transparent, int):
            image.putalpha(Image.fromarray(np.where(wide == transparent, 0, 255).astype(np.uint8)))
    elif transparent is not None and not _fits(transparent):
        # A 16-bit colour that is transparent; of the pixels only the high bytes are left to compare with
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _fits(transparent: object) -> bool:
    return not isinstance(transparent, tuple) or max(transparent) <= 0xFF
