"""Class ids: what a number means is told by names, never by a place among those that happen to be there."""

import io
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from varpi.data import open_dataset
from varpi.data.classes import imagenet_classes, number_classes, read_classes, readable, wordnet_ids
from varpi.data.stream import StreamBatches
from varpi.errors import VarpiError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.png")
    return root


def parquet(path: Path, labels: list[int], names: list[str] | None) -> Path:
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    images = [{"bytes": png.getvalue(), "path": None}] * len(labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(path)
    return path


def ids(dataset: Any) -> list[int]:
    return [dataset[index].condition for index in range(len(dataset))]


def test_imagenet_in_the_order_of_its_ids() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert readable(["n01440764", "dog"]) == ["tench", "dog"]
    assert list(wordnet_ids()) == sorted(set(wordnet_ids()))  # the ids follow the WordNet ids
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 340: "zebra", 483: "castle", 985: "daisy"}
    assert {number: classes[number][1] for number in known} == known
    assert classes[340][0] == "n02391049"
    assert classes[999] == ("n15075141", "toilet tissue")


def test_folders_named_by_wordnet_id_get_imagenets_ids(tmp_path: Path) -> None:
    few = open_dataset(folders(tmp_path, "n15075141", "n01440764", "n02391049"), image_size=8)
    assert ids(few) == [0, 340, 999]
    assert few.num_classes == 1000
    assert few.class_names == wordnet_ids()


def test_wordnet_ids_of_other_classes_are_mere_names(tmp_path: Path) -> None:
    mixed = open_dataset(folders(tmp_path, "n02391049", "n00000001"), image_size=8)
    assert (ids(mixed), mixed.class_names) == ([0, 1], ("n00000001", "n02391049"))


@pytest.mark.parametrize("by_file", [True, False])
def test_listed_classes_number_the_folders(by_file: bool, tmp_path: Path) -> None:
    root = folders(tmp_path / "images", "cat", "ant")
    listed: Any = ["cow", "cat", "bee", "ant"]
    if by_file:
        (tmp_path / "classes.txt").write_text("cow\ncat\nbee\nant\n")
        listed = tmp_path / "classes.txt"
    named = open_dataset(root, image_size=8, classes=listed)
    assert ids(named) == [3, 1]
    assert (named.num_classes, named.class_names) == (4, ("cow", "cat", "bee", "ant"))
    assert named.fingerprint != open_dataset(root, image_size=8).fingerprint


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (["ant", "bee"], r"images: 1 of its 2 classes \(cat\) are none of the 2 known ones \(ant, bee, …\)"),
        ("absent.txt", r"absent\.txt: no such file; classes are a list, a file with a name a line, or 'imagenet'"),
        ([], "names no class"),
        (["ant", "cat", "ant"], r"the name of class 2 is the same as an earlier one \('ant'\)"),
        (["ant", "", "cat"], "the name of class 1 is empty"),
        ("imagenet", r"2 of its 2 classes \(ant, cat\) are none of the 1000 known"),
    ],
)
def test_lists_that_do_not_fit(listed: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=message):
        open_dataset(folders(tmp_path / "images", "ant", "cat"), image_size=8, classes=listed)


def test_captions_have_no_classes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image_path": "x.png", "text": "a cat"}\n')
    with pytest.raises(VarpiError, match=r"a\.jsonl: has captions, but 2 classes are named for it"):
        open_dataset(tmp_path / "a.jsonl", image_size=8, classes=["a", "b"])


def test_digits_by_name(tmp_path: Path) -> None:
    plain = open_dataset("digits", image_size=32, split="test")
    listed = open_dataset("digits", image_size=32, split="test", classes=[*"9876543210"])
    assert plain.class_names == tuple("0123456789")
    assert ids(listed) == [9 - number for number in ids(plain)]


def test_named_labels_of_a_table_are_looked_up(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [0, 1, 1], ["cat", "ant"])
    assert ids(open_dataset(path, image_size=8)) == [0, 1, 1]
    listed = open_dataset(path, image_size=8, classes=["ant", "bee", "cat"])
    assert (ids(listed), listed.class_names) == ([2, 0, 0], ("ant", "bee", "cat"))
    with pytest.raises(VarpiError, match=r"1 of its 2 classes \(ant\) are none of the 2 known"):
        open_dataset(path, image_size=8, classes=["cat", "dog"])
    batches = StreamBatches.open(path, image_size=8, classes=["ant", "bee", "cat"], batch_size=3, seed=0)
    assert sorted(next(batches.from_cursor(0)).condition) == [0, 0, 2]
    assert (batches.num_classes, batches.class_names) == (3, ("ant", "bee", "cat"))


def test_bare_numbers_are_ids_already(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", [2, 0], None)
    assert open_dataset(path, image_size=8).class_names is None
    listed = open_dataset(path, image_size=8, classes=["ant", "bee", "cat", "dog"])
    assert (ids(listed), listed.num_classes) == ([2, 0], 4)
    with pytest.raises(
        VarpiError, match=r"column 'label' holds 2, but data.classes, or the generator, names 2 classes"
    ):
        open_dataset(path, image_size=8, classes=["ant", "bee"])


@pytest.mark.parametrize("other", [["dog", "cat"], ["cat", "dog", "fox"], None])
@pytest.mark.parametrize("stream", [True, False])
def test_files_that_number_classes_differently_are_refused(
    stream: bool, other: list[str] | None, tmp_path: Path
) -> None:
    parquet(tmp_path / "data" / "a.parquet", [0, 1], ["cat", "dog"])
    parquet(tmp_path / "data" / "b.parquet", [0, 1], other)

    def opened(source: object) -> object:
        if stream:
            return StreamBatches.open(str(source), image_size=8, batch_size=2, seed=0)
        return open_dataset(str(source), image_size=8)

    message = r"a\.parquet and .*b\.parquet number the classes of column 'label' differently \(cat, dog and "
    for source in (tmp_path / "data", str(tmp_path / "data" / "*.parquet")):
        with pytest.raises(VarpiError, match=message):
            opened(source)


def test_two_classes_of_one_name() -> None:
    with pytest.raises(VarpiError, match="it: names two classes 'a'"):
        number_classes(["a", "b", "a"], None, "it")
    assert read_classes(["a", "b"]) == ("a", "b")
