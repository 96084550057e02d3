"""One decoder for every route: which formats, how many pixels, which colours, which way up."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from varpi.data import BadImage, Dropped, open_dataset
from varpi.data.images import FORMATS, MAX_PIXELS, SUFFIXES, decode
from varpi.data.pixels import to_uint8
from varpi.samples.reading import open_samples

RED = (200, 30, 10)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def corner(image: Image.Image) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(np.asarray(image)[0, 0].tolist())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_read_by_its_format(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image{suffix}"
    form = next(form for form, suffixes in FORMATS.items() if suffix in suffixes)
    Image.new("RGB", (16, 16), RED).save(path, form)
    assert np.abs(np.subtract(corner(decode(path, "image")), RED)).max() <= 6  # JPEG and WebP lose a little


def test_the_first_frame_of_many(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255))]
    for form in ("GIF", "TIFF"):
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert corner(decode(content, "image")) == RED


def test_postscript_starts_no_program(tmp_path: Path) -> None:
    """Whatever it is called. A file stands for what Ghostscript would have done."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (bin_ / "gs").chmod(0o755)
    eps = tmp_path / "image.jpg"
    eps.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    script = f"""
from pathlib import Path
from varpi.data import BadImage
from varpi.data.images import decode
try:
    decode(Path({str(eps)!r}), "image.jpg")
except BadImage as error:
    print(error)
"""
    path = f"{bin_}:{os.environ['PATH']}"
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PATH": path}, capture_output=True)
    assert done.stdout.decode() == "image.jpg: unreadable image (none of JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM)\n"
    assert not (tmp_path / "ran").exists()


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def test_too_many_pixels_are_refused_by_the_header() -> None:
    assert MAX_PIXELS < 13_000 * 13_000
    with pytest.raises(BadImage, match=r"^huge: 13000x13000 pixels are more than 100000000, the most that is decoded$"):
        decode(_png_header(13_000, 13_000), "huge")
    with pytest.raises(BadImage, match="huge: unreadable image"):  # Pillow's own limit comes first
        decode(_png_header(100_000, 100_000), "huge")
    with pytest.raises(BadImage, match="truncated"):  # within the limit, it is decoded
        decode(_png_header(10_000, 10_000), "large")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(BadImage, match=r"^it: unreadable image \(.*(not a regular file|Is a directory)"):
            decode(path, "it")


def test_sixteen_bits_are_scaled_in_every_mode() -> None:
    gray = np.array([[0, 0x00FF, 0x0100, 0x8000, 0xFFFF]], np.uint16)
    expected = [0, 0, 1, 0x80, 0xFF]
    for form in ("PNG", "TIFF"):
        found = np.asarray(decode(encoded(Image.fromarray(gray), form), "image"))
        assert found[0, :, 0].tolist() == found[0, :, 2].tolist() == expected
    plain = b"P2 5 1 65535\n0 255 256 32768 65535\n"
    assert np.asarray(decode(plain, "image"))[0, :, 1].tolist() == expected


def test_pixels_without_a_known_range_are_refused() -> None:
    for image in (Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 70_000), Image.new("I", (4, 4), -1)):
        with pytest.raises(BadImage, match="have no known range"):
            decode(encoded(image, "TIFF"), "image")


def test_alpha_is_composited_on_white() -> None:
    half = Image.new("RGBA", (4, 4), (*RED, 128))
    expected = tuple(round((value * 128 + 255 * 127) / 255) for value in RED)
    assert np.abs(np.subtract(corner(decode(encoded(half), "image")), expected)).max() <= 1
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    for image in (clear, clear.convert("LA"), clear.convert("P")):
        assert corner(decode(encoded(image), "image")) == (255, 255, 255)
    assert corner(decode(encoded(clear, "WEBP", lossless=True), "image")) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "color"), [("L", 9), ("RGB", RED), ("I;16", 0x1234)])
def test_a_transparent_colour_is_white(mode: str, color: object) -> None:
    image = Image.new(mode, (4, 4), color)
    assert corner(decode(encoded(image, transparency=color), "image")) == (255, 255, 255)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "turned"), [(1, 0), (3, 180), (6, 270), (8, 90)])
def test_orientation_is_applied(form: str, orientation: int, turned: int) -> None:
    stored = Image.new("RGB", (32, 16), "white")
    stored.paste((0, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    found = decode(encoded(stored, form, exif=exif), "image")
    expected = stored.rotate(turned, expand=True)
    assert found.size == expected.size
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 8


def _with_segment(jpeg: bytes, content: bytes) -> bytes:
    """With an APP1 segment, where JPEG keeps EXIF and XMP."""
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


@pytest.mark.parametrize(
    "metadata",
    [
        b"Exif\0\0" + bytes(range(64)),
        b"Exif\0\0II*\0\x08\0\0\0\x40\0\x12\x01\x03\0",
        b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"> \xff\xfe',
    ],
    ids=["garbage", "cut", "XMP"],
)
def test_damaged_metadata_leave_the_pixels_alone(metadata: bytes) -> None:
    clean = encoded(Image.effect_noise((32, 16), 90).convert("RGB"), "JPEG")
    damaged = np.asarray(decode(_with_segment(clean, metadata), "image"))
    if damaged.shape[0] == 32:  # an orientation that could be read after all
        damaged = np.rot90(damaged)
    np.testing.assert_array_equal(damaged, np.asarray(decode(clean, "image")))


def test_damaged_metadata_of_png(tmp_path: Path) -> None:
    image = Image.effect_noise((16, 16), 90).convert("RGB")
    damaged = decode(encoded(image, exif=bytes(range(20))), "image")
    np.testing.assert_array_equal(np.asarray(damaged), np.asarray(image))


def test_what_is_cut_short_is_refused() -> None:
    whole = {form: encoded(Image.effect_noise((64, 64), 90).convert("RGB"), form) for form in ("JPEG", "PNG", "BMP")}
    for form, content in whole.items():
        with pytest.raises(BadImage, match=f"^{form}: unreadable image"):
            decode(content[:-40], form)


def test_small_images_are_dropped_whichever_way_up() -> None:
    with pytest.raises(Dropped, match="the shorter side must have 17"):
        decode(encoded(Image.new("RGB", (40, 16))), "image", min_side=17)


def test_training_and_evaluation_see_the_same_pixels(tmp_path: Path) -> None:
    """Of each unusual image, a folder of classes and a folder of samples give the same bytes."""
    ramp = (np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).astype(np.uint16)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    images = {
        "deep.png": encoded(Image.fromarray(ramp)),
        "cmyk.jpg": encoded(Image.effect_noise((16, 16), 90).convert("CMYK"), "JPEG"),
        "clear.png": encoded(Image.fromarray((ramp >> 8).astype(np.uint8)).convert("LA")),
        "turned.tif": encoded(Image.fromarray((ramp >> 8).astype(np.uint8)), "TIFF", exif=exif),
        "frames.gif": encoded(Image.effect_noise((16, 16), 90), "GIF"),
    }
    folder = tmp_path / "train" / "only"
    folder.mkdir(parents=True)
    for name, content in images.items():
        (folder / name).write_bytes(content)
    trained = open_dataset(tmp_path / "train", image_size=16)
    judged = next(iter(open_samples(folder).batches([range(len(images))]))).images
    assert len(trained) == len(images)
    for i in range(len(images)):
        np.testing.assert_array_equal(to_uint8(trained[i].image[None])[0].transpose(2, 0, 1), judged[i].numpy())
