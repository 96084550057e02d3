"""Small files that claim to be large: refused by arithmetic, before memory is taken."""

import io
import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from varpi.errors import VarpiError
from varpi.evaluation.reference import open_reference
from varpi.runtime.numpy_files import read_arrays, read_npy
from varpi.samples.reading import open_samples


def npy(shape: tuple[int, ...], descr: str = "|u1", data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def npz(path: Path, content: bytes, how: int = zipfile.ZIP_STORED, name: str = "arr_0") -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("shape", [(10**12, 256, 256, 3), (10**30, 8, 8, 3), (1, 4, 4, 3)])
def test_a_header_that_claims_what_is_not_there(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", npy(shape, data=bytes(47)))
    with pytest.raises(VarpiError, match=r"a\.npz: cannot be read as \.npz \(ValueError: its header claims uint8"):
        open_samples(path)


def test_negative_sizes_and_huge_headers(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", npy((-1, -4, 4, 3), data=bytes(48)))
    with pytest.raises(VarpiError, match="its header claims uint8"):
        open_samples(path)
    begin = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1)
    npz(path, begin + bytes(100))
    with pytest.raises(VarpiError, match="its header has 4294967295 bytes"):
        open_samples(path)


def test_what_inflates_a_thousandfold(tmp_path: Path) -> None:
    """One million images of zeros, 300 MB in 300 kB: honest, and still refused before any is read."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as member:
        member.write(npy((1_000_000, 10, 10, 3)))
        for _ in range(300):
            member.write(bytes(1_000_000))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(VarpiError, match=r"arr_0 claims to unpack from \d+ bytes to 300000128"):
        open_samples(path)
    np.savez_compressed(path, arr_0=np.zeros((100, 64, 64, 3), np.uint8))  # small enough to be let be
    assert open_samples(path).count == 100


def test_strange_archives_are_said_in_a_line(tmp_path: Path) -> None:
    path = npz(tmp_path / "lzma.npz", npy((1, 4, 4, 3), data=bytes(48)), zipfile.ZIP_LZMA)
    with pytest.raises(VarpiError, match="arr_0 is packed in a way that numpy has not"):
        open_samples(path)
    whole = bytearray(npz(tmp_path / "locked.npz", npy((1, 4, 4, 3), data=bytes(48))).read_bytes())
    whole[6] |= 1  # "encrypted", in the member's own header and in the directory's
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.npz").write_bytes(whole)
    with pytest.raises(VarpiError, match=r"^[^\n]*locked\.npz: cannot be read as \.npz \(RuntimeError: File[^\n]*$"):
        open_samples(tmp_path / "locked.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(VarpiError, match="not a regular file"):
        read_arrays(tmp_path / "pipe.npz", ["mu"], 100)


def test_statistics_are_bounded(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", npy((10**6, 10**6), "<f8", bytes(8)), name="sigma")
    with pytest.raises(VarpiError, match=r"a\.npz: cannot be read as \.npz \(ValueError: its header claims float64"):
        open_reference(path)
    np.savez(path, mu=np.zeros(100))
    with pytest.raises(VarpiError, match=r"float64 \(100,\) are 800 bytes; at most 799 are read here"):
        read_arrays(path, ["mu"], 799)
    np.savez(path, mu=np.array(["a", "b"]), sigma=np.eye(2))
    with pytest.raises(VarpiError, match=r"a\.npz: mu and sigma must hold numbers"):
        open_reference(path)


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_as_they_are(order: str, tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", a=array, b=array[0])
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy", 1000), array)
    found = read_arrays(tmp_path / "a.npz", ["a", "b", "c"], 1000)
    assert set(found) == {"a", "b"}
    np.testing.assert_array_equal(found["b"], array[0])
