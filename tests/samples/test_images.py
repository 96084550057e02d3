"""Images to bytes and files and back."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import GOLDEN
from PIL import Image

from varpi.data.pixels import from_uint8, to_uint8
from varpi.errors import VarpiError
from varpi.samples.images import (
    NpzWriter,
    make_grid,
    resize_384_to_256,
    save_grid,
    save_npz,
)


def pictures(n: int = 5, size: int = 6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def test_golden_resize():
    golden = np.load(GOLDEN / "images.npz")
    resized = to_uint8(resize_384_to_256(torch.from_numpy(golden["float384"])))
    assert resized.shape == golden["uint8_256"].shape
    np.testing.assert_array_equal(resized, golden["uint8_256"])


def test_quantization_by_hand():
    values = torch.tensor([-5.0, -1.0, -0.999, 0.0, 0.999, 1.0, 5.0])
    images = values.view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    assert to_uint8(images)[:, 0, 0, 0].tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_channels_come_last():
    images = torch.full((2, 3, 4, 5), -1.0)
    images[:, 1] = 1.0
    assert to_uint8(images).shape == (2, 4, 5, 3)
    assert to_uint8(images)[1, 2, 3].tolist() == [0, 255, 0]


def test_every_byte_survives_the_round_trip():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    tensor = from_uint8(images)
    assert tensor.min() == -1
    assert tensor.max() == 1
    np.testing.assert_array_equal(to_uint8(tensor), images)


def test_npz_holds_the_images_as_adm_reads_them(tmp_path):
    images = pictures()
    save_npz(tmp_path / "deep" / "samples.npz", images)
    with np.load(tmp_path / "deep" / "samples.npz") as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], images)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["samples.npz"]


def test_grid_places_images_row_by_row(tmp_path):
    images = pictures(5)
    grid = make_grid(images, 3, gap=2)
    assert grid.shape == (14, 22, 3)
    np.testing.assert_array_equal(grid[8:14, 8:14], images[4])
    assert (grid[6:8] == 255).all()
    assert (grid[8:, 16:] == 255).all()
    save_grid(tmp_path / "grid.png", images)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid)


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    save_npz(tmp_path / "samples.npz", pictures(2))

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(VarpiError, match=r"samples\.npz: could not be written \(.*No space left on device\)"):
        save_npz(tmp_path / "samples.npz", pictures(3))
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    assert len(np.load(tmp_path / "samples.npz")["arr_0"]) == 2


def test_bad_tensors():
    with pytest.raises(VarpiError, match=r"expected images of shape \(B, 3, H, W\), got \(2, 1, 4, 4\)"):
        to_uint8(torch.zeros(2, 1, 4, 4))
    broken = torch.zeros(4, 3, 2, 2)
    broken[1, 0, 0, 0] = broken[3, 2] = float("nan")
    with pytest.raises(VarpiError, match="2 of 4 images hold NaN"):
        to_uint8(broken)
    with pytest.raises(VarpiError, match=r"\(B, 3, 384, 384\), got \(1, 3, 256, 256\)"):
        resize_384_to_256(torch.zeros(1, 3, 256, 256))
    with pytest.raises(VarpiError, match=r"got float64 \(1, 2, 2, 3\)"):
        from_uint8(np.zeros((1, 2, 2, 3)))
    with pytest.raises(VarpiError, match="columns is 0"):
        make_grid(pictures(), 0)


def test_npz_in_parts_is_the_npz_of_the_whole(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(256, size=(5, 4, 6, 3), dtype=np.uint8)
    with NpzWriter(tmp_path / "parts.npz", images.shape) as writer:
        writer.write(images[:2])
        writer.write(images[2:])
    assert np.array_equal(np.load(tmp_path / "parts.npz")["arr_0"], images)
    assert np.array_equal(np.load(tmp_path / "parts.npz")["arr_0"], images)
    assert [path.name for path in tmp_path.iterdir()] == ["parts.npz"]


def test_npz_in_parts_appears_only_when_whole(tmp_path: Path) -> None:
    images = np.zeros((5, 4, 6, 3), dtype=np.uint8)
    with (
        pytest.raises(VarpiError, match="2 images were written instead of 5"),
        NpzWriter(tmp_path / "a.npz", images.shape) as writer,
    ):
        writer.write(images[:2])
    with (
        pytest.raises(VarpiError, match=r"images of shape \(4, 4, 3\) instead of \(4, 6, 3\)"),
        NpzWriter(tmp_path / "a.npz", images.shape) as writer,
    ):
        writer.write(images[:, :, :4])
    assert list(tmp_path.iterdir()) == []
