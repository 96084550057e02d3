import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import GOLDEN
from PIL import Image

from varpi.data import BadImage, Dropped, center_crop, to_tensor
from varpi.data.transforms import load_image


@pytest.mark.parametrize("case", range(7))
def test_crop_matches_the_original_byte_for_byte(case: int) -> None:
    golden = np.load(GOLDEN / "images.npz")
    width, height, size, bicubic = (int(value) for value in golden[f"meta{case}"])
    how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.NEAREST
    image = Image.fromarray(golden[f"in{case}_small"]).resize((width, height), how)
    np.testing.assert_array_equal(np.asarray(center_crop(image, size)), golden[f"out{case}"])


@pytest.mark.parametrize(("width", "height"), [(20, 30), (31, 31), (1, 1), (65, 129), (33, 3000)])
def test_crop_of_any_size_is_the_size_asked_for(width: int, height: int) -> None:
    assert center_crop(Image.new("RGB", (width, height)), 32).size == (32, 32)


def test_small_images_are_scaled_up_around_their_middle() -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 200  # exactly the middle square
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 32))
    assert (cropped[:, 8:24] == 200).all()


def test_tensor_maps_bytes_to_minus_one_and_one() -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = (0, 255, 51)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.shape == (3, 2, 3)
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


def _gray16() -> Image.Image:
    return Image.fromarray(np.full((40, 40), 0x8000, np.uint16))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (40, 40), 128), (128, 128, 128)),
        (Image.new("LA", (40, 40), (128, 255)), (128, 128, 128)),
        (Image.new("1", (40, 40), 1), (255, 255, 255)),
        (Image.new("RGBA", (40, 40), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("CMYK", (40, 40), (255, 0, 0, 0)), (0, 255, 255)),
        (Image.new("RGB", (40, 40), (10, 20, 30)).quantize(4), (10, 20, 30)),
        (_gray16(), (128, 128, 128)),
    ],
    ids=["gray", "gray-alpha", "bits", "rgba", "cmyk", "palette", "gray16"],
)
def test_color_modes_become_rgb(image: Image.Image, expected: tuple[int, ...], tmp_path: Path) -> None:
    for suffix in ("tiff",) if image.mode == "CMYK" else ("tiff", "png"):  # PNG has no CMYK
        path = tmp_path / f"image.{suffix}"
        image.save(path)
        loaded = load_image(path, "image", 32)
        assert ((loaded[:, 5, 5] + 1) * 127.5).round().int().tolist() == list(expected), suffix


def test_palette_with_transparency_is_converted_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (40, 40), (10, 20, 30)).quantize(4).save(path, transparency=b"\x00\x80\xff\x10")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path, "image", 32).shape == (3, 32, 32)


def _png_with_bad_checksum() -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk) ^ 1)


def test_broken_files_are_bad_images_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((200, 200), 90).save(whole)
    broken = {
        "empty": b"",
        "text": b"<html>404</html>",
        "truncated": whole.read_bytes()[:3000],
        "checksum": _png_with_bad_checksum(),
    }
    for name, content in broken.items():
        with pytest.raises(BadImage, match=f"^{name}: unreadable image") as caught:
            load_image(content, name, 32)
        assert "\n" not in str(caught.value)
        assert "BytesIO" not in str(caught.value)
    with pytest.raises(BadImage, match="No such file"):
        load_image(tmp_path / "absent.jpg", "absent", 32)


def test_a_thin_strip_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "strip.png"
    Image.new("RGB", (1, 9000)).save(path)
    with pytest.raises(BadImage, match="1x9000 pixels"):
        load_image(path, "strip", 256)


def test_small_images_are_dropped_by_their_header_alone(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    Image.effect_noise((300, 200), 90).save(path)
    header = path.read_bytes()[:1000]  # decoding this much would fail
    with pytest.raises(Dropped, match=r"^image: 300x200 pixels; the shorter side must have 201$"):
        load_image(header, "image", 32, min_side=201)
    with pytest.raises(BadImage, match="truncated"):
        load_image(header, "image", 32, min_side=200)
    assert load_image(path, "image", 32, min_side=200).shape == (3, 32, 32)
