from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from shards import png, red_of, write_shard

from varpi.data import Dropped, open_dataset
from varpi.data.source import locate
from varpi.errors import VarpiError


def _names(source: object, split: str = "train") -> list[str]:
    return [path.name for path in locate(str(source), split).paths]


def _shards(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_shard(folder / name, range(2))
    return folder


def test_commas_braces_globs_and_directories(tmp_path: Path) -> None:
    names = [f"{number:05}.tar" for number in range(8, 12)]
    folder = _shards(tmp_path / "shards", *names)
    assert _names(folder) == _names(f"{folder}/*.tar") == _names(f"{folder}/{{00008..00011}}.tar") == names
    assert _names(f"{folder}/00009.tar, {folder}/00008.tar") == ["00009.tar", "00008.tar"]
    assert _names(f"{folder}/{{00009,00008}}.tar,{folder}/0001?.tar") == ["00009.tar", "00008.tar", *names[2:]]
    assert _names(f"{folder},{folder}/00008.tar") == [*names, "00008.tar"]
    _shards(tmp_path, "odd[1],{2}.tar")
    assert _names(tmp_path / "odd[1],{2}.tar") == ["odd[1],{2}.tar"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/{{00..02}}.tar", r"02\.tar: no such file, or no data in it; .*\{00\.\.02\}\.tar' names it"),
        ("{}/00.tar,{}/05.tar", r"05\.tar: no such file"),
        ("{}/x*.tar", r"x\*\.tar: no file matches this pattern"),
        ("{}/{{3..1}}.tar", r"\{3\.\.1\} must count upwards"),
        ("{}/{{0..999999999}}.tar", "to at most 1000000 files"),
        ("{}/0*", r"also names .*01\.txt, which is not a \.tar file"),
        ("{}/01.txt", r"01\.txt: not a data set; expected a directory or a \.parquet, \.tar or \.jsonl file"),
        ("shards/05.tar", "no such data"),
    ],
)
def test_files_that_do_not_fit(source: str, message: str, tmp_path: Path) -> None:
    _shards(tmp_path, "00.tar", "01.tar")
    (tmp_path / "01.txt").touch()
    with pytest.raises(VarpiError, match=message):
        open_dataset(source.format(tmp_path, tmp_path), image_size=16)


def test_compressed_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(VarpiError, match=r"a\.tar\.gz: compressed with gzip"):
        open_dataset(tmp_path / "a.tar.gz", image_size=16)


def test_shards_win_over_their_metadata_but_not_over_class_folders(tmp_path: Path) -> None:
    """img2dataset writes 00000.parquet beside 00000.tar; ImageNet comes as archives of what are then its folders."""
    folder = _shards(tmp_path / "laion", "00000.tar")
    pq.write_table(pa.table({"caption": ["a"]}), folder / "00000.parquet")
    (folder / "logs").mkdir()
    assert locate(str(folder), "train").kind == "tar"
    _shards(tmp_path / "imagenet", "cat.tar")
    (tmp_path / "imagenet" / "cat").mkdir()
    (tmp_path / "imagenet" / "cat" / "1.png").write_bytes(png(1))
    assert locate(str(tmp_path / "imagenet"), "train").kind == "folders"
    (folder / "list.jsonl").touch()
    with pytest.raises(VarpiError, match=r"laion: holds tar shards and jsonl files; name those"):
        open_dataset(folder, image_size=16)


def test_one_directory_per_split(tmp_path: Path) -> None:
    _shards(tmp_path / "train", "0.tar")
    _shards(tmp_path / "val", "1.tar")
    assert _names(tmp_path) == ["0.tar"]
    assert _names(tmp_path, "validation") == _names(tmp_path, "val") == ["1.tar"]
    with pytest.raises(VarpiError, match=r"no split 'test'; it has train, val$"):
        locate(str(tmp_path), "test")
    for source in (tmp_path / "val", tmp_path / "val" / "1.tar"):
        with pytest.raises(VarpiError, match="no split 'test'; data without splits is split 'train'"):
            locate(str(source), "test")


def test_captioned_digits() -> None:
    digits = open_dataset("captioned-digits", image_size=32, split="test")
    assert digits.num_classes is None
    assert digits[3].condition == digits.caption(3)


def _parquet(path: Path) -> Path:
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": [0, 1], "caption": ["one", "two"]}), path)
    return path


def test_min_side_is_the_image_size_unless_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table, shard = _parquet(tmp_path / "a.parquet"), write_shard(tmp_path / "a.tar", range(2))
    for source, options in ((table, {"caption_column": "caption"}), (shard, {})):
        with pytest.raises(Dropped, match="20x24 pixels; the shorter side must have 21"):
            open_dataset(source, image_size=21, **options)[1]
        assert open_dataset(source, image_size=21, min_side=0, **options)[1].image.shape == (3, 21, 21)
        assert open_dataset(source, image_size=20, **options)[1].image.shape == (3, 20, 20)
    assert open_dataset(table, image_size=21)[1].image.shape == (3, 21, 21)  # classes: scaled up


def test_features_take_the_place_of_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "features"
    (root / "a").mkdir(parents=True)
    save_file({"features": torch.arange(6.0).view(3, 2)}, root / "a" / "00001.safetensors")
    shard = write_shard(tmp_path / "a.tar", range(2))
    item = open_dataset(shard, image_size=16, caption_features=root)[1]
    assert (red_of(item.image), item.condition.tolist()) == (1, [[0, 1], [2, 3], [4, 5]])
    with pytest.raises(VarpiError, match="has classes, but caption_features are for captions"):
        open_dataset(_parquet(tmp_path / "b.parquet"), image_size=16, caption_features=root)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("digits", {"caption_column": "caption"}, "digits: has classes, and no field .*leave out caption_column"),
        ("captioned-digits", {"caption_column": "caption"}, "has captions of its own; leave out caption_column"),
        ("captioned-digits", {"min_side": 8}, "min_side is for captioned images of many sizes"),
        ("{}/tree", {"caption_column": ["caption"]}, "has classes, and no field"),
        ("{}/tree", {"min_side": 8}, "min_side is for captioned images"),
        ("{}/a.parquet", {"min_side": 8}, "min_side is for captioned images"),
        (
            "{}/a.parquet",
            {"caption_column": "caption", "label_column": "class"},
            "label_column 'class' and caption_colu",
        ),
        ("{}/a.parquet", {"caption_column": []}, r"caption_column is \[\]; give the name"),
        ("{}/a.parquet", {"caption_column": ["caption", ""]}, r"caption_column is \['caption', ''\]"),
        ("{}/a.parquet", {"image_size": 0}, "image_size is 0"),
    ],
)
def test_contradictions_are_refused(
    source: str, options: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    _parquet(tmp_path / "a.parquet")
    (tmp_path / "tree" / "cat").mkdir(parents=True)
    (tmp_path / "tree" / "cat" / "1.png").write_bytes(png(1))
    with pytest.raises(VarpiError, match=message):
        open_dataset(source.format(tmp_path), **{"image_size": 32, **options})
