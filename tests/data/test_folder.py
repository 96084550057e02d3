import os
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from varpi.data import BadImage, center_crop, open_dataset, to_tensor
from varpi.data.classes import wordnet_ids
from varpi.errors import VarpiError


def _tree(root: Path, classes: dict[str, int], size: tuple[int, int] = (40, 30)) -> Path:
    """Folders of plain images whose red is the class and whose green is the number within it."""
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, (label * 50, number * 50, 0)).save(root / name / f"{number}.png")
    return root


def test_photographs(tmp_path: Path) -> None:
    photos = open_dataset(tiny.photographs(tmp_path, ((500, 375), (333, 500), (64, 64), (75, 56))), image_size=64)
    assert (len(photos), photos.num_classes) == (4, 1000)
    assert photos.class_names == wordnet_ids()
    assert sorted(path.name for path in tmp_path.iterdir()) == list(wordnet_ids()[:4])
    for index in range(4):
        (file,) = (tmp_path / photos.class_names[index]).iterdir()
        image, label = photos[index]
        assert label == index
        with Image.open(file) as original:
            assert torch.equal(image, to_tensor(center_crop(original.convert("RGB"), 64)))


def test_ids_follow_the_sorted_names(tmp_path: Path) -> None:
    folder = open_dataset(_tree(tmp_path, {"b": 2, "a": 1, "c": 0}), image_size=16)
    assert folder.class_names == ("a", "b", "c")
    assert [folder[index].condition for index in range(3)] == [0, 1, 1]
    assert folder[0].image[0, 0, 0] == pytest.approx(50 / 127.5 - 1)  # made second, so red is 50


def test_nested_and_hidden_files(tmp_path: Path) -> None:
    _tree(tmp_path, {"a": 1, "a/deeper": 1, ".cache": 1})
    (tmp_path / "a" / "._0.png").write_bytes(b"left by a Mac")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    folder = open_dataset(tmp_path, image_size=16)
    assert (len(folder), folder.class_names) == (2, ("a",))


def test_splits_of_a_directory(tmp_path: Path) -> None:
    _tree(tmp_path / "train", {"a": 3, "b": 1})
    _tree(tmp_path / "val", {"a": 1, "b": 1})
    assert len(open_dataset(tmp_path, image_size=16)) == 4
    assert len(open_dataset(tmp_path, image_size=16, split="validation")) == 2
    with pytest.raises(VarpiError, match="no split 'test'; it has train, val"):
        open_dataset(tmp_path, image_size=16, split="test")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    folder = open_dataset(_tree(tmp_path, {"bus": 1, "train": 2}), image_size=16)
    assert (len(folder), folder.class_names) == (3, ("bus", "train"))


def test_fingerprint_follows_names_count_and_sizes(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_dataset(tmp_path, image_size=16).fingerprint

    _tree(tmp_path, {"a": 2, "b": 2})
    first = fingerprint()
    assert first == fingerprint()
    os.utime(tmp_path / "a" / "0.png")
    assert first == fingerprint()
    seen = {first}
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "9.png")
    seen.add(fingerprint())
    (tmp_path / "b" / "0.png").unlink()
    seen.add(fingerprint())
    with (tmp_path / "b" / "1.png").open("ab") as file:
        file.write(b"more")
    seen.add(fingerprint())
    assert len(seen) == 4


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    _tree(tmp_path, {"a": 1})
    (tmp_path / "a" / "broken.jpg").write_bytes(b"nothing")
    folder = open_dataset(tmp_path, image_size=16)
    with pytest.raises(BadImage, match=r"a/broken\.jpg: unreadable image \(none of JPEG"):
        folder[1]


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=r"no class folders; expected .*CLASS_NAME"):
        open_dataset(tmp_path, image_size=16)
    Image.new("RGB", (9, 9)).save(tmp_path / "loose.png")
    with pytest.raises(VarpiError, match="no class folders"):
        open_dataset(tmp_path, image_size=16)
    (tmp_path / "a").mkdir()
    with pytest.raises(VarpiError, match=r"no images in its class folders; known are \.jpg"):
        open_dataset(tmp_path, image_size=16)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match="absent: no such data; give a directory"):
        open_dataset(tmp_path / "absent", image_size=16)
    text = tmp_path / "list.txt"
    text.write_text("a")
    with pytest.raises(VarpiError, match=r"list\.txt: not a data set"):
        open_dataset(text, image_size=16)
    with pytest.raises(VarpiError, match="no file matches"):
        open_dataset(f"{tmp_path}/*.parquet", image_size=16)
    with pytest.raises(VarpiError, match="image_size is 0"):
        open_dataset(_tree(tmp_path / "x", {"a": 1}), image_size=0)


def test_a_single_tree_has_no_validation_split(tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match="no split 'validation'; a single tree"):
        open_dataset(_tree(tmp_path, {"a": 1}), image_size=16, split="validation")
