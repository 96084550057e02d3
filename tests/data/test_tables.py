import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from varpi.data import BadImage, Dropped, open_dataset, to_tensor
from varpi.data.stream import StreamBatches
from varpi.data.tables import decode_cell
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


def test_photographs_in_one_parquet_file(tmp_path: Path) -> None:
    """CIFAR-10's layout on the Hub, as JPEG: image{bytes, path} and label, classes without names."""
    draws = np.random.default_rng(0)
    images = []
    for _ in range(30):
        buffer = io.BytesIO()
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    path = tmp_path / "test.parquet"
    pq.write_table(pa.table({"image": images, "label": [index % 10 for index in range(30)]}), path)
    photos = open_dataset(path, image_size=32)
    assert (len(photos), photos.num_classes, photos.class_names) == (30, 10, None)
    for index in (0, 7, 29):
        with Image.open(io.BytesIO(images[index]["bytes"])) as original:
            assert torch.equal(photos[index].image, to_tensor(original.convert("RGB")))
        assert photos[index].condition == index % 10


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
    assert (saved.num_classes, saved.class_names, saved[1].condition) == (3, ("x", "y", "z"), 2)
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


def _captioned(path: Path, **columns: list) -> Path:
    rows = len(next(iter(columns.values())))
    images = [{"bytes": _png(red), "path": f"{red}.png"} for red in range(rows)]
    pq.write_table(pa.table({"image": images, **columns}), path)
    return path


def test_captions_of_the_first_column_that_has_one(tmp_path: Path) -> None:
    """FLUX-Reason-6M: caption_original where it is given, else caption_detail; either may be null."""
    original, detail = ["one", None, " ", None], ["long one", "long two", None, "long four"]
    path = _captioned(tmp_path / "a.parquet", caption_original=original, caption_detail=detail)
    table = open_dataset(path, image_size=16, caption_column=["caption_original", "caption_detail"])
    assert (len(table), table.num_classes, table.class_names) == (4, None, None)
    assert _reds_but(table, 2) == [0, 1, 3]
    assert [table[index].condition for index in (0, 1, 3)] == ["one", "long two", "long four"]
    assert [table.caption(index) for index in (0, 1, 3)] == ["one", "long two", "long four"]
    assert [table.key(index) for index in (0, 3)] == ["rows/0", "rows/3"]
    for look in (table.caption, table.__getitem__):
        with pytest.raises(Dropped, match=r"a\.parquet\[train\] row 2: no caption in caption_original or cap"):
            look(2)


def _reds_but(dataset, *left_out: int) -> list[int]:
    indices = [index for index in range(len(dataset)) if index not in left_out]
    return [round((float(dataset[index].image[0, 8, 8]) + 1) * 127.5) for index in indices]


def test_captions_in_structs_and_lists(tmp_path: Path) -> None:
    columns = {"meta": [{"caption": "inner"}, None], "texts": [["a", "b"], ["c", "d"]], "a.b": ["dots", "more"]}
    path = _captioned(tmp_path / "a.parquet", **columns)
    assert open_dataset(path, image_size=16, caption_column=["meta.caption", "texts.1"])[1].condition == "d"
    assert open_dataset(path, image_size=16, caption_column="meta.caption")[0].condition == "inner"
    assert open_dataset(path, image_size=16, caption_column="a.b")[1].condition == "more"


@pytest.mark.parametrize(
    ("columns", "caption_column", "message"),
    [
        ({"text": ["a"]}, "caption", r"no column 'caption'; set caption_column to one of its columns \(image, text\)"),
        ({"text": ["a"]}, ["text", "meta.caption"], "no column 'meta'; set caption_column"),
        ({"text": [None, " "], "other": ["", None]}, ["text", "other"], "no row has a caption in text or other"),
        ({"text": [1, 2]}, "text", "no row has a caption in text; set caption_column"),
    ],
)
def test_captions_that_are_not_there(columns: dict, caption_column: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=message):
        open_dataset(_captioned(tmp_path / "a.parquet", **columns), image_size=16, caption_column=caption_column)


def test_fingerprint_of_captions(tmp_path: Path) -> None:
    def fingerprint(name: str, captions: list[str]) -> str:
        path = _captioned(tmp_path / name, text=captions)
        return open_dataset(path, image_size=16, caption_column="text").fingerprint

    assert fingerprint("a.parquet", ["one", "two"]) == fingerprint("b.parquet", ["one", "two"])
    assert fingerprint("c.parquet", ["one", "two"]) != fingerprint("d.parquet", ["one", "three"])


REPOSITORY = "hf://datasets/org/cats@0123"


def _cell(path: str) -> dict[str, str | None]:
    return {"bytes": None, "path": path}


def test_images_that_lie_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Files:
        def cat_file(self, path: str) -> bytes:
            return _png({"cat.png": 7, "zip://cat.png::a.zip": 9}[path])

    monkeypatch.setattr("fsspec.url_to_fs", lambda url: (Files(), url.replace(f"{REPOSITORY}/", "")))
    for path, red in ((f"{REPOSITORY}/cat.png", 7), (f"zip://cat.png::{REPOSITORY}/a.zip", 9)):
        image = decode_cell(_cell(path), "row 1", 16, repository=REPOSITORY)
        assert round((float(image[0, 8, 8]) + 1) * 127.5) == red
    with pytest.raises(BadImage, match=r"row 2 \(hf://.*/dog\.png\): cannot be fetched"):
        decode_cell(_cell(f"{REPOSITORY}/dog.png"), "row 2", 16, repository=REPOSITORY)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "file:///etc/hostname",
        "s3://bucket/a.png",
        "hf://datasets/org/other@0123/a.png",
        f"{REPOSITORY}/../../other/a.png",
        f"http://example.org/a.png::{REPOSITORY}/a.zip",
        f"simplecache::http://example.org/a.zip::{REPOSITORY}/a.zip",
        f"zip://a.png::{REPOSITORY}4/a.zip",
    ],
)
def test_rows_fetch_nothing_else(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.url_to_fs", lambda url: pytest.fail(f"{url} was fetched"))
    for repository in (None, REPOSITORY):
        with pytest.raises(BadImage, match="only local files and those of the dataset's own Hub repository are read"):
            decode_cell(_cell(url), "row 1", 16, repository=repository)


def test_relative_paths_begin_at_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, red in (("here", 5), ("there", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(_png(red))
        image = pa.array([_cell("x.png")], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pa.table({"image": image, "label": [0]}), tmp_path / name / f"{name}.parquet")
    monkeypatch.chdir(tmp_path / "here")
    assert _reds(open_dataset(tmp_path / "there" / "there.parquet", image_size=16)) == [9]
    assert _reds(open_dataset(tmp_path / "there", image_size=16)) == [9]
    both = open_dataset(f"{tmp_path}/here/here.parquet,{tmp_path}/there/there.parquet", image_size=16)
    with pytest.raises(BadImage, match="is a relative path, and the table's files lie in several folders"):
        both[0]


def test_files_whose_other_columns_differ(tmp_path: Path) -> None:
    """Read whatever their order, by the columns asked for; one that lacks such a column is named."""
    rows = {"image": [{"bytes": _png(3), "path": None}], "caption": ["a cat"]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    pq.write_table(pa.table({**rows, "more": [1]}), tmp_path / "b.parquet")
    for files in ("a,b", "b,a"):
        source = ",".join(f"{tmp_path}/{file}.parquet" for file in files.split(","))
        table = open_dataset(source, image_size=16, caption_column="caption")
        assert [table[index].condition for index in range(len(table))] == ["a cat", "a cat"]
        stream = StreamBatches.open(source, image_size=16, caption_column="caption", batch_size=2, seed=0)
        assert next(stream.from_cursor(0)).condition == ["a cat", "a cat"]
    pq.write_table(pa.table({"image": rows["image"]}), tmp_path / "c.parquet")
    with pytest.raises(VarpiError, match=r"c\.parquet: no column 'caption'; set caption_column to one of its columns"):
        open_dataset(tmp_path, image_size=16, caption_column="caption")
