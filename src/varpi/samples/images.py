"""Images as evaluators want them: uint8, in PNG files, in one grid, or in an ADM-style `.npz`.

Shapes: B images of H x W pixels. Tensors are float (B,3,H,W) in [-1,1], arrays are uint8 (B,H,W,3).
"""

import math
import os
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from varpi.data.pixels import check_bytes
from varpi.errors import VarpiError
from varpi.runtime.files import write_aside


def resize_384_to_256(images: torch.Tensor) -> torch.Tensor:
    """Bring images (B,3,384,384) to float32 (B,3,256,256) as the paper does before its ImageNet evaluation.

    Bicubic on the decoder's float output, without antialiasing; quantize afterwards.
    """
    if images.ndim != 4 or images.shape[1:] != (3, 384, 384):
        raise VarpiError(f"expected images of shape (B, 3, 384, 384), got {tuple(images.shape)}")
    return functional.interpolate(images.float(), size=(256, 256), mode="bicubic", align_corners=False)


def save_png(path: str | os.PathLike[str], image: np.ndarray, *, sync: bool = True) -> None:
    """Write one uint8 image (H,W,3) as PNG; its directory is made when missing. sync: see `write_aside`."""
    check_bytes(image[None], "image")
    write_aside(path, lambda aside: Image.fromarray(image).save(aside, format="png"), sync=sync)


def save_grid(path: str | os.PathLike[str], images: np.ndarray, *, columns: int | None = None) -> None:
    """Write uint8 images (B,H,W,3) as one PNG, row by row; `columns` defaults to the nearest square."""
    check_bytes(images, "images")
    save_png(path, make_grid(images, columns or math.ceil(math.sqrt(len(images)))))


def make_grid(images: np.ndarray, columns: int, *, gap: int = 2) -> np.ndarray:
    """Lay uint8 images (B,H,W,3) out row by row, white `gap` pixels between them: uint8 (H',W',3)."""
    if columns < 1:
        raise VarpiError(f"columns is {columns}; it must be >= 1")
    count, height, width, _ = images.shape
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


class NpzWriter:
    """Writes the array `arr_0` of an `.npz` file part by part, uint8 (B,H,W,3) in all; the file appears when whole."""

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, int, int, int]) -> None:
        self._path, self._shape, self._written = Path(path), shape, 0
        self._aside = self._path.with_name(f".writing-{self._path.name}")

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            archive = opening.enter_context(zipfile.ZipFile(self._aside, "w", zipfile.ZIP_STORED))
            # A member's own date, so that the same images are the same bytes at any time
            member = zipfile.ZipInfo("arr_0.npy", (1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o600 << 16
            self._member = opening.enter_context(archive.open(member, "w", force_zip64=True))
            header = {"descr": "|u1", "fortran_order": False, "shape": self._shape}
            np.lib.format.write_array_header_1_0(self._member, header)
            self._open = opening.pop_all()
        return self

    def write(self, images: np.ndarray) -> None:
        """Append uint8 images (b,H,W,3). Raises VarpiError for another size than was announced."""
        check_bytes(images, f"{self._path}")
        if images.shape[1:] != self._shape[1:]:
            raise VarpiError(f"{self._path}: images of shape {images.shape[1:]} instead of {self._shape[1:]}")
        self._member.write(np.ascontiguousarray(images).data)
        self._written += len(images)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self._open.close()
            if kind is None and self._written != self._shape[0]:
                raise VarpiError(f"{self._path}: {self._written} images were written instead of {self._shape[0]}")
            if kind is None:
                os.replace(self._aside, self._path)
        finally:
            self._aside.unlink(missing_ok=True)


def save_npz(path: str | os.PathLike[str], images: np.ndarray) -> None:
    """Write uint8 images (B,H,W,3) as the array `arr_0` of an `.npz` file, which the ADM evaluator reads."""
    check_bytes(images, "images")
    write_aside(path, lambda aside: _save_array(aside, images))


def _save_array(path: Path, images: np.ndarray) -> None:
    with path.open("wb") as file:  # given a name, numpy would append .npz to it
        np.savez(file, arr_0=images)
