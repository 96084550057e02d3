import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from varpi.data import BadImage, open_dataset, to_tensor
from varpi.errors import VarpiError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` converts parquet to Arrow in a cache; keep that out of the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def _png(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 24), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _parquet(path: Path, reds: list[int], *, broken: int | None = None) -> Path:
    images = [{"bytes": b"junk" if red == broken else _png(red), "path": f"{red}.png"} for red in reds]
    pq.write_table(pa.table({"image": images, "label": [red % 3 for red in reds]}), path)
    return path


def _reds(dataset) -> list[int]:
    return [round((float(dataset[index].image[0, 8, 8]) + 1) * 127.5) for index in range(len(dataset))]


def _saved_images(reds: list[int]) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    images = [{"bytes": _png(red), "path": None} for red in reds]
    return datasets.Dataset.from_dict({"image": images, "label": [red % 3 for red in reds]}, features=features)


def test_cifar_from_one_parquet_file(shared: Path) -> None:
    path = shared / "data" / "cifar10" / "test.parquet"
    photos = open_dataset(path, image_size=32)
    assert (len(photos), photos.num_classes, photos.class_names) == (10_000, 10, None)
    row = pq.read_table(path).slice(7, 1).to_pylist()[0]
    with Image.open(io.BytesIO(row["image"]["bytes"])) as original:
        assert torch.equal(photos[7].image, to_tensor(original.convert("RGB")))
    assert photos[7].condition == row["label"]


def test_parquet_file_directory_and_glob(tmp_path: Path) -> None:
    _parquet(tmp_path / "train-00000-of-00002.parquet", [1, 2])
    _parquet(tmp_path / "train-00001-of-00002.parquet", [3])
    _parquet(tmp_path / "test-00000-of-00001.parquet", [200])
    assert _reds(open_dataset(tmp_path, image_size=16)) == [1, 2, 3]
    assert _reds(open_dataset(tmp_path, image_size=16, split="test")) == [200]
    assert _reds(open_dataset(f"{tmp_path}/train-*.parquet", image_size=16)) == [1, 2, 3]
    table = open_dataset(tmp_path / "test-00000-of-00001.parquet", image_size=16)
    assert (_reds(table), table[0].condition, table.num_classes) == ([200], 2, 3)
    with pytest.raises(VarpiError, match=r"cannot be read as parquet .*validation"):
        open_dataset(tmp_path, image_size=16, split="validation")


def test_a_clone_of_a_hub_repository(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    _parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [4, 5])
    assert _reds(open_dataset(tmp_path, image_size=16)) == [4, 5]


def test_saved_dataset_and_dictionary(tmp_path: Path) -> None:
    _saved_images([10, 11]).save_to_disk(tmp_path / "one")
    saved = open_dataset(tmp_path / "one", image_size=16)
    assert _reds(saved) == [10, 11]
    assert (saved.num_classes, saved.class_names, saved[1].condition) == (3, ["x", "y", "z"], 2)
    splits = {"train": _saved_images([10]), "validation": _saved_images([20, 30])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert _reds(open_dataset(tmp_path / "two", image_size=16, split="validation")) == [20, 30]
    _saved_images([]).save_to_disk(tmp_path / "none")
    with pytest.raises(VarpiError, match="no images; the saved dataset has no rows"):
        open_dataset(tmp_path / "none", image_size=16)
    with pytest.raises(VarpiError, match="no split 'test'; it has train, validation"):
        open_dataset(tmp_path / "two", image_size=16, split="test")
    with pytest.raises(VarpiError, match="no split 'test'; data without splits"):
        open_dataset(tmp_path / "one", image_size=16, split="test")


def test_images_stored_as_paths_and_as_plain_bytes(tmp_path: Path) -> None:
    (tmp_path / "9.png").write_bytes(_png(9))
    image = [{"bytes": None, "path": str(tmp_path / "9.png")}]
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int32()})
    pq.write_table(pa.table({"image": image, "label": [1]}, schema=schema), tmp_path / "paths.parquet")
    assert _reds(open_dataset(tmp_path / "paths.parquet", image_size=16)) == [9]
    pq.write_table(pa.table({"jpg": [_png(8)], "class": [1]}), tmp_path / "bytes.parquet")
    table = open_dataset(tmp_path / "bytes.parquet", image_size=16, image_column="jpg", label_column="class")
    assert _reds(table) == [8]
    assert len(table.fingerprint) == 64


def test_hub_id_and_revision_reach_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, split, revision))
        return _saved_images([1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(open_dataset("org/photos", image_size=16)) == 1
    open_dataset("org/photos@v1.0", image_size=16, split="test")
    assert asked == [("org/photos", "train", None), ("org/photos", "test", "v1.0")]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_args: object, **_kwargs: object) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach 'org/photos' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(VarpiError, match=r"org/photos: no such path here, and not .*reach 'org/photos' on the Hub"):
        open_dataset("org/photos", image_size=16)


def test_a_broken_cell_is_a_bad_image_and_the_rest_is_fine(tmp_path: Path) -> None:
    table = open_dataset(_parquet(tmp_path / "a.parquet", [1, 2, 3], broken=2), image_size=16)
    with pytest.raises(BadImage, match=r"a\.parquet\[train\] row 1 \(2\.png\): unreadable image"):
        table[1]
    assert table[2].condition == 0


def test_an_empty_cell_is_a_bad_image(tmp_path: Path) -> None:
    image = pa.array([{"bytes": _png(1), "path": None}, None])
    pq.write_table(pa.table({"image": image, "label": [0, 1]}), tmp_path / "a.parquet")
    table = open_dataset(tmp_path / "a.parquet", image_size=16)
    with pytest.raises(BadImage, match="row 1: the cell is empty"):
        table[1]


def test_fingerprint_follows_labels_and_sizes(tmp_path: Path) -> None:
    def fingerprint(name: str, reds: list[int]) -> str:
        return open_dataset(_parquet(tmp_path / name, reds), image_size=16).fingerprint

    first = fingerprint("a.parquet", [1, 2, 3])
    assert first == fingerprint("b.parquet", [1, 2, 3])
    assert first != fingerprint("c.parquet", [1, 2])
    assert first != fingerprint("d.parquet", [1, 3, 2])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"], "label": [0]}, r"no column 'image'; set image_column to one of its columns \(picture, la"),
        ({"image": [b"x"], "class": [0]}, r"no column 'label'; set label_column to one of its columns \(image, class"),
        ({"image": [b"x"], "label": ["cat"]}, "column 'label' holds string; expected integer class ids"),
        ({"image": [b"x"] * 2, "label": [0, None]}, "column 'label' holds no class at row 1"),
        ({"image": [b"x"], "label": [-1]}, "column 'label' holds no class at row 0"),
        ({"image": [3], "label": [0]}, "column 'image' holds int64; expected images"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "no images; the table has no rows"),
    ],
    ids=["image", "label", "text", "null", "negative", "number", "empty"],
)
def test_tables_that_do_not_fit(columns: dict, message: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(VarpiError, match=message):
        open_dataset(tmp_path / "a.parquet", image_size=16)


def test_damaged_containers(tmp_path: Path) -> None:
    whole = _parquet(tmp_path / "whole.parquet", [1, 2]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VarpiError, match=r"cut\.parquet: cannot be read as parquet \(.*[Pp]arquet") as caught:
        open_dataset(tmp_path / "cut.parquet", image_size=16)
    assert "\n" not in str(caught.value)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(VarpiError, match="saved: cannot be read as a saved dataset"):
        open_dataset(tmp_path / "saved", image_size=16)
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(VarpiError, match=r"notes\.txt, which is not a \.parquet file"):
        open_dataset(f"{tmp_path}/*.*", image_size=16)
