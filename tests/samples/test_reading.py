"""Sets of images: every form gives the same pixels and the same sha256, in any parts; each bad one is refused."""

import hashlib
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from varpi.errors import VarpiError
from varpi.evaluation.reference import open_reference
from varpi.samples.images import save_grid, save_npz, save_png
from varpi.samples.reading import contents_sha256, open_samples


def pictures(n: int = 11, size: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size + 1, 3), dtype=np.uint8)


def folder(path, images):
    for i, image in enumerate(images):
        save_png(path / f"{i:05d}.png", image)
    return path


def read(images, ranges=None, workers=0):
    """The images of a set, (B,H,W,3), and its sha256."""
    batches = list(images.batches(ranges or [range(images.count)], workers))
    whole = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
    return whole, contents_sha256(images.height, images.width, [batch.digests for batch in batches])


@pytest.fixture
def forms(tmp_path):
    """The same images in every form."""
    images = pictures()
    folder(tmp_path / "folder", images)
    save_grid(tmp_path / "folder" / "grid.png", images)
    save_npz(tmp_path / "stored.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", other=np.zeros(3), arr_0=images)
    for part, piece in enumerate(np.split(images, [3, 4])):
        save_npz(tmp_path / "parts" / f"part-{part}.npz", piece)
    folder(tmp_path / "sampled", images)
    save_grid(tmp_path / "sampled" / "grid.png", images)
    save_npz(tmp_path / "sampled" / "samples.npz", images)
    (tmp_path / "sampled" / "sample.json").write_text(json.dumps({"seed": 3, "classes": list(range(11))}))
    return tmp_path


FORMS = ["folder", "stored.npz", "packed.npz", "parts", "parts/part-*.npz", "sampled"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_set(forms, form):
    images = open_samples(forms / form)
    assert (images.count, images.height, images.width) == (11, 6, 7)
    whole, sha256 = read(images)
    np.testing.assert_array_equal(whole, pictures())
    assert sha256 == read(open_samples(forms / "stored.npz"))[1]


@pytest.mark.parametrize("form", ["folder", "packed.npz", "parts"])
def test_parts_may_be_skipped_and_span_files(forms, form):
    images = open_samples(forms / form)
    ranges = [range(1, 2), range(2, 5), range(9, 11)]
    np.testing.assert_array_equal(read(images, ranges)[0], pictures()[[1, 2, 3, 4, 9, 10]])


def test_the_sha256_is_of_size_and_pixels_in_order(forms):
    sha256 = hashlib.sha256(
        b"6x7x3 uint8\n" + b"".join(hashlib.sha256(image.tobytes()).digest() for image in pictures())
    )
    assert read(open_samples(forms / "folder"))[1] == sha256.hexdigest()
    save_npz(forms / "reversed.npz", pictures()[::-1])
    assert read(open_samples(forms / "reversed.npz"))[1] != sha256.hexdigest()


def test_workers_read_what_this_process_reads(forms):
    images = open_samples(forms / "folder")
    ranges = [range(0, 4), range(4, 8), range(8, 11)]
    whole, sha256 = read(images, ranges, workers=2)
    np.testing.assert_array_equal(whole, pictures())
    assert sha256 == read(images)[1]
    (forms / "folder" / "00009.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(VarpiError, match=r"^[^\n]*00009\.png: unreadable image[^\n]*$"):
        read(images, ranges, workers=2)


def test_only_the_asked_part_of_an_archive_is_in_memory(tmp_path):
    """arr_0 is 75 MB; reading two images of it takes no more than zipfile's own steps of 16 MB."""
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((100, 500, 500, 3), dtype=np.uint8))
    images = open_samples(tmp_path / "large.npz")
    tracemalloc.start()
    batches = list(images.batches([range(98, 100)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batches[0].images.shape == (2, 3, 500, 500)
    assert peak < 40e6


def test_the_key_changes_with_the_files(forms):
    for form, file in (("folder", "00003.png"), ("stored.npz", None), ("parts", "part-1.npz")):
        path = forms / form
        images = open_samples(path)
        before = images.key
        assert before == open_samples(path).key
        changed = path if file is None else path / file
        os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1000))
        assert open_samples(path).key != before
        assert images.key != before  # it looks anew


def test_the_record_of_a_sampling(forms):
    assert open_samples(forms / "sampled").sampling == {"seed": 3, "classes": list(range(11))}
    assert open_samples(forms / "folder").sampling is None
    (forms / "sampled" / "samples.npz").unlink()
    assert read(open_samples(forms / "sampled"))[1] == read(open_samples(forms / "folder"))[1]
    (forms / "sampled" / "sample.json").write_text(json.dumps({"prompts": ["a dog"]}))
    with pytest.raises(VarpiError, match=r"sample\.json: lists 1 prompts, and there are 11 images"):
        open_samples(forms / "sampled")
    (forms / "sampled" / "sample.json").write_text("{")
    with pytest.raises(VarpiError, match=r"sample\.json: cannot be read as JSON"):
        open_samples(forms / "sampled")
    (forms / "sampled" / "sample.json").write_text("[]")
    with pytest.raises(VarpiError, match=r"sample\.json: holds a list, not the record"):
        open_samples(forms / "sampled")


def test_images_that_are_refused(tmp_path):
    with pytest.raises(VarpiError, match=r"nowhere: no such file or directory; expected an \.npz"):
        open_samples(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VarpiError, match="empty: holds no images"):
        open_samples(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(VarpiError, match=r"notes\.txt: not a set of images"):
        open_samples(tmp_path / "notes.txt")
    with pytest.raises(VarpiError, match=r"also names .*notes\.txt, which is not an \.npz"):
        open_samples(tmp_path / "n*")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(VarpiError, match=r"arr_0: expected uint8 of shape \(B, H, W, 3\), got float64"):
        open_samples(tmp_path / "float.npz")
    np.savez(tmp_path / "none.npz", arr_0=np.zeros((0, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(VarpiError, match=r"got uint8 \(0, 4, 4, 3\)"):
        open_samples(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", images=pictures())
    with pytest.raises(VarpiError, match=r"no array named arr_0 \(found: images\)"):
        open_samples(tmp_path / "other.npz")
    np.savez(tmp_path / "columns.npz", arr_0=np.asfortranarray(pictures()))
    with pytest.raises(VarpiError, match="stored column by column"):
        open_samples(tmp_path / "columns.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "columns.npz").read_bytes()[:200])
    with pytest.raises(VarpiError, match=r"cut\.npz: cannot be read as \.npz"):
        open_samples(tmp_path / "cut.npz")
    save_npz(tmp_path / "sizes" / "a.npz", pictures(size=6))
    save_npz(tmp_path / "sizes" / "b.npz", pictures(size=8))
    with pytest.raises(VarpiError, match=r"b\.npz: is 9x8 where a\.npz is 7x6; an evaluation needs one size"):
        open_samples(tmp_path / "sizes")


def test_images_that_turn_out_bad_on_the_way(tmp_path):
    images = open_samples(folder(tmp_path / "folder", pictures()))
    save_png(tmp_path / "folder" / "00004.png", pictures(size=8)[0])
    with pytest.raises(VarpiError, match=r"00004\.png: is 9x8 where 00000\.png is 7x6"):
        read(images)
    (tmp_path / "folder" / "00004.png").write_bytes(b"\x89PNG nonsense")
    with pytest.raises(VarpiError, match=r"00004\.png: unreadable image"):
        read(images)
    np.savez_compressed(tmp_path / "damaged.npz", arr_0=pictures(200))
    content = bytearray((tmp_path / "damaged.npz").read_bytes())
    content[5000:5200] = bytes(200)
    (tmp_path / "damaged.npz").write_bytes(content)
    with pytest.raises(VarpiError, match=r"damaged\.npz: cannot be read as \.npz"):
        read(open_samples(tmp_path / "damaged.npz"))


def test_gray_and_transparent_images_become_rgb(tmp_path):
    Image.new("L", (4, 3), 7).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 3), (1, 2, 3, 0)).save(tmp_path / "b.png")
    whole, _ = read(open_samples(tmp_path))
    assert whole[:, 0, 0].tolist() == [[7, 7, 7], [255, 255, 255]]


def test_reference_with_statistics(tmp_path):
    arrays = {"mu": np.arange(4.0), "sigma": np.eye(4), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "adm.npz", arr_0=pictures(), **arrays)
    reference = open_reference(tmp_path / "adm.npz")
    assert reference.images is not None
    np.testing.assert_array_equal(read(reference.images)[0], pictures())
    np.testing.assert_array_equal(reference.statistics["pool"].mean, np.arange(4.0))
    np.testing.assert_array_equal(reference.statistics["spatial"].covariance, np.eye(2))
    assert reference.file_sha256 == hashlib.sha256((tmp_path / "adm.npz").read_bytes()).hexdigest()
    np.savez(tmp_path / "only.npz", mu=arrays["mu"], sigma=arrays["sigma"].astype(np.float32))
    reference = open_reference(tmp_path / "only.npz")
    assert reference.images is None
    assert set(reference.statistics) == {"pool"}
    assert reference.statistics["pool"].covariance.dtype == np.float64


def test_references_of_images(forms):
    for form in FORMS:
        reference = open_reference(forms / form)
        assert reference.images is not None
        assert (reference.statistics, reference.file_sha256) == ({}, None)
        np.testing.assert_array_equal(read(reference.images)[0], pictures())


def test_datasets_as_references(tmp_path):
    digits = open_reference("digits").images
    assert digits is not None
    assert (digits.count, digits.height, digits.width) == (800, 32, 32)
    assert open_reference("digits").source == digits.source == "digits[test]"
    assert digits.key != open_reference("digits", split="validation").images.key
    classes = tmp_path / "data" / "train" / "cat"
    folder(classes, pictures(3, size=20))
    cropped = open_reference(tmp_path / "data", split="train", image_size=8).images
    assert cropped is not None
    assert read(cropped)[0].shape == (3, 8, 8, 3)
    with pytest.raises(VarpiError, match="a dataset as the reference needs the size of its images: give image_size"):
        open_reference(tmp_path / "data", split="train")


def test_references_that_are_refused(tmp_path):
    with pytest.raises(VarpiError, match=r"no such file or directory.*to read a dataset, name its split as well"):
        open_reference(tmp_path / "nowhere")
    np.savez(tmp_path / "half.npz", mu=np.zeros(4))
    with pytest.raises(VarpiError, match=r"half\.npz: holds mu alone; mu and sigma belong together"):
        open_reference(tmp_path / "half.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(4), sigma=np.eye(5))
    with pytest.raises(VarpiError, match=r"mu \(4,\) and sigma \(5, 5\) are no mean and covariance"):
        open_reference(tmp_path / "shape.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    with pytest.raises(VarpiError, match="mu or sigma holds NaN or infinity"):
        open_reference(tmp_path / "nan.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(VarpiError, match=r"text\.npz: cannot be read as \.npz"):
        open_reference(tmp_path / "text.npz")


def test_npz_written_by_numpy_alone_reads_back_the_same(tmp_path):
    np.savez(tmp_path / "plain.npz", pictures())
    np.testing.assert_array_equal(read(open_samples(tmp_path / "plain.npz"))[0], pictures())
