import gzip
import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from shards import png, red_of, write_shard, write_tar

from varpi.data import BadImage, Batches, Dropped, Item, open_dataset
from varpi.data.captions import CAPTION_FIELDS
from varpi.data.tars import TarShards, check_shard, read_samples
from varpi.errors import VarpiError


def _open(*paths: Path, **options) -> TarShards:
    return TarShards(paths, image_size=16, **options)


def _members(*names: str) -> dict[str, bytes]:
    """`names` with a caption that says which one it is; images are images."""
    return {name: png(7) if name.endswith("png") else f"caption of {name}".encode() for name in names}


def test_samples_in_the_order_of_shards_and_members(tmp_path: Path) -> None:
    second, first = write_shard(tmp_path / "b.tar", range(3, 5)), write_shard(tmp_path / "a.tar", range(3))
    shards = _open(second, first)
    assert [red_of(shards[index].image) for index in range(len(shards))] == [3, 4, 0, 1, 2]
    assert [shards.caption(index) for index in range(5)] == ["red 3", "red 4", "red 0", "red 1", "red 2"]
    assert shards[3].condition == "red 1"
    assert [shards.key(index) for index in (0, 4)] == ["b/00003", "a/00002"]
    assert (shards.num_classes, shards.class_names) == (None, None)


def test_a_key_ends_at_the_first_dot_of_the_last_part(tmp_path: Path) -> None:
    names = ["v1.0/a.PNG", "v1.0/a.txt", "./b.png", "./b.txt", "c.side.png", "c.txt", "._b.png", "d.png"]
    members = _members(*names) | {"v1.0/a.PNG": png(1)}
    shards = _open(write_tar(tmp_path / "s.tar", members))
    assert [shards.key(index) for index in range(len(shards))] == ["s/v1.0/a", "s/b", "s/d"]
    assert [shards.caption(index) for index in range(2)] == ["caption of v1.0/a.txt", "caption of ./b.txt"]


def test_parts_of_a_sample_need_not_be_neighbors(tmp_path: Path) -> None:
    shards = _open(write_tar(tmp_path / "s.tar", _members("a.txt", "b.png", "a.png", "b.txt")))
    assert {shards.key(index): shards.caption(index) for index in range(2)} == {
        "s/a": "caption of a.txt",
        "s/b": "caption of b.txt",
    }


def test_names_that_lead_out_are_kept_inside(tmp_path: Path) -> None:
    shards = _open(write_tar(tmp_path / "s.tar", _members("../../etc/a.png", "/b.png")))
    assert [shards.key(index) for index in range(2)] == ["s/etc/a", "s/b"]


@pytest.mark.parametrize(
    ("record", "text", "fields", "expected"),
    [
        ({"alt": "alt", "caption": "caption"}, b"text", CAPTION_FIELDS, "caption"),
        ({"caption": " ", "meta": {"text": "inner"}}, b"text", CAPTION_FIELDS, "inner"),
        ({"sentences": [{"raw": "first"}]}, None, CAPTION_FIELDS, "first"),
        ({"caption": "caption", "long": {"en": "long one"}}, b"text", ("long.en", "caption"), "long one"),
        ({"caption": None}, "a tëxt\n".encode(), CAPTION_FIELDS, "a tëxt"),
        (b'{"caption": "cut', b"text", CAPTION_FIELDS, "text"),
        (b"[" * 100_000, b"text", CAPTION_FIELDS, "text"),
        (b'{"caption": "half \\ud83d"}', b"text", CAPTION_FIELDS, "text"),
        ({"caption": "x" * 10_000}, None, CAPTION_FIELDS, "x" * 10_000),
        (None, b"text", CAPTION_FIELDS, "text"),
    ],
)
def test_which_caption(record, text: bytes | None, fields, expected: str, tmp_path: Path) -> None:
    members = {"a.png": png(1)}
    if record is not None:
        members["a.json"] = record if isinstance(record, bytes) else json.dumps(record).encode()
    if text is not None:
        members["a.txt"] = text
    assert _open(write_tar(tmp_path / "s.tar", members), caption_fields=fields).caption(0) == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "s.tar/a: neither .json nor .txt beside the image"),
        ({"a.json": b"{"}, "s.tar/a: damaged JSON$"),
        ({"a.json": b"[1]"}, "damaged JSON"),
        ({"a.json": b'{"caption": "\\ud83d"}'}, "no usable caption in its JSON$"),
        ({"a.json": b'{"caption": ""}', "a.txt": b" \n"}, "no usable caption in its JSON, its text is blank"),
        ({"a.txt": "grün".encode("latin-1")}, "its text is not UTF-8"),
        ({"a.json": '{"caption": "grün"}'.encode("latin-1")}, "damaged JSON"),
    ],
)
def test_an_image_without_a_caption_is_dropped(members: dict[str, bytes], message: str, tmp_path: Path) -> None:
    shards = _open(write_tar(tmp_path / "s.tar", {"a.png": png(1), **members}))
    for look in (shards.caption, shards.__getitem__):
        with pytest.raises(Dropped, match=message):
            look(0)


def test_bad_and_small_images(tmp_path: Path) -> None:
    members = {"a.jpg": b"junk", "a.txt": b"a", "b.png": png(1, (40, 15)), "b.txt": b"b", "c.png": png(1, (16, 40))}
    shards = _open(write_tar(tmp_path / "s.tar", {**members, "c.txt": b"c"}), min_side=16)
    with pytest.raises(BadImage, match=r"s\.tar/a: unreadable image"):
        shards[0]
    with pytest.raises(Dropped, match=r"s\.tar/b: 40x15 pixels; the shorter side must have 16"):
        shards[1]
    assert shards[2].condition == "c"


def test_samples_without_an_image_are_no_items(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", _members("a.txt", "b.png", "b.txt", "c.json"))
    assert len(_open(path)) == 1
    with pytest.raises(VarpiError, match=r"none\.tar: no images in the tar shards; known are .jpg .jpeg"):
        _open(write_tar(tmp_path / "none.tar", _members("a.txt", "b.txt")))
    with pytest.raises(VarpiError, match=r"empty\.tar: no images"):
        _open(write_tar(tmp_path / "empty.tar", {}))


def test_long_names_and_other_members(tmp_path: Path) -> None:
    """Names past 100 bytes and Unicode take a second header each, in both forms of tar."""
    stem = "ä" * 90
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{form}.tar"
        (tmp_path / f"{stem}.png").write_bytes(png(5))
        with tarfile.open(path, "w", format=form) as archive:
            archive.add(tmp_path / f"{stem}.png", f"folder/{stem}.png")
            archive.add(tmp_path, "folder", recursive=False)
            link = tarfile.TarInfo("z.png")
            link.type, link.linkname = tarfile.SYMTYPE, "folder"
            archive.addfile(link)
        shards = _open(path)
        assert (len(shards), shards.key(0)) == (1, f"{form}/folder/{stem}")


def test_damaged_shards_are_refused_with_the_last_whole_member(tmp_path: Path) -> None:
    whole = write_shard(tmp_path / "whole.tar", range(4)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        offsets = {member.name: member.offset_data for member in archive}

    def refused(content: bytes, message: str) -> None:
        path = tmp_path / "cut.tar"
        path.write_bytes(content)
        with pytest.raises(VarpiError, match=message) as caught:
            _open(path)
        assert "\n" not in str(caught.value)

    text = offsets["00002.txt"]
    image = offsets["00003.png"]
    refused(whole[: image + 30], r"cut\.tar: cut short.*00003\.png goes.*whole member is 00002\.txt: fetch")
    refused(whole[: text - 512], r"cut\.tar: stops after 00002\.json without the mark.*truncate -s \+1024")
    refused(whole[: text - 300], r"cut\.tar: cut short or damaged at byte \d+ .*whole member is 00002\.json")
    refused(whole[: text + 6], r"cut\.tar: cut short .*whole member is 00002\.txt")
    broken = whole[: text - 512] + b"x" * 512 + whole[text:]
    refused(broken, r"damaged at byte \d+ \(no tar header\); .*00002\.json: fetch")
    refused(whole[:530], r"00000\.png goes beyond the file's end\); no member is whole")
    refused(b"", r"cut\.tar: not a tar archive \(empty header\)")
    refused(b"<html>" * 200, r"cut\.tar: not a tar archive")
    refused(gzip.compress(whole), r"cut\.tar: compressed with gzip, .*decompress it first")
    with pytest.raises(VarpiError, match=r"absent\.tar: cannot be read \(No such file"):
        _open(tmp_path / "absent.tar")


def test_a_shard_that_shrinks_later_gives_bad_images(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", range(3))
    shards = _open(path)
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(BadImage, match=r"a\.tar: shorter than when it was opened"):
        shards[2]


def test_fingerprint_follows_names_sizes_and_members(tmp_path: Path) -> None:
    first = _open(write_shard(tmp_path / "a.tar", range(3))).fingerprint
    (tmp_path / "other").mkdir()
    assert first == _open(write_shard(tmp_path / "other" / "a.tar", range(3))).fingerprint
    assert first != _open(write_shard(tmp_path / "b.tar", range(3))).fingerprint
    assert first != _open(write_shard(tmp_path / "other" / "a.tar", range(40))).fingerprint


def test_shards_of_one_name_have_no_keys(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shards = _open(write_shard(tmp_path / "a.tar", range(1)), write_shard(tmp_path / "other" / "a.tar", range(1)))
    assert len(shards) == 2
    with pytest.raises(VarpiError, match=r"a\.tar and .*other/a\.tar have the same name"):
        shards.key(0)


def test_copies_in_other_processes(tmp_path: Path) -> None:
    shards = _open(*(write_shard(tmp_path / f"{shard}.tar", range(shard, shard + 2)) for shard in range(3)))
    first = shards[4]  # opens a file before the copy is made
    copy = pickle.loads(pickle.dumps(shards))
    assert torch.equal(copy[4].image, first.image)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        items = pool.map(shards.caption, [5, 4, 3, 2, 1, 0] * 20)
    assert items == [shards.caption(index) for index in [5, 4, 3, 2, 1, 0] * 20]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_in_mid_epoch_and_share_among_processes(workers: int, tmp_path: Path) -> None:
    for shard in range(2):
        write_shard(tmp_path / f"{shard}.tar", range(10 * shard, 10 * shard + 10))
    shards = open_dataset(tmp_path, image_size=16)
    whole = Batches(shards, batch_size=6, seed=0)
    resumed = Batches(shards, batch_size=6, seed=0, workers=workers).from_cursor(2)
    parts = [Batches(shards, batch_size=6, seed=0, rank=rank, world_size=2).from_cursor(2) for rank in range(2)]
    for step in range(2, 5):
        expected, found = whole.at(step), next(resumed)
        halves = [next(part) for part in parts]
        assert torch.equal(found.images, expected.images)
        assert found.condition == expected.condition == [f"red {index}" for index in expected.indices.tolist()]
        assert halves[0].condition + halves[1].condition == expected.condition


def test_reading_in_order_gives_the_same_samples(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", range(3))
    assert [(name, parts["txt"], parts["image"]) for name, parts in read_samples(str(path))] == [
        (f"{path}/{red:05}", f"text {red}".encode(), png(red)) for red in range(3)
    ]
    path = write_tar(tmp_path / "b.tar", _members("a.txt", "b.png", "b.txt", "b.json"))
    samples = list(read_samples(str(path)))
    assert [(name, sorted(parts)) for name, parts in samples] == [
        (f"{path}/a", ["txt"]),
        (f"{path}/b", ["image", "json", "txt"]),
    ]
    content = path.read_bytes()
    check_shard(str(path))
    path.write_bytes(content[:2100])
    with pytest.raises(VarpiError, match=r"b\.tar: does not end as a tar archive does; it was cut short"):
        check_shard(str(path))
    with pytest.raises(VarpiError, match=r"b\.tar: cut short or damaged"):
        list(read_samples(str(path)))


def test_items_hold_captions(tmp_path: Path) -> None:
    item = open_dataset(write_shard(tmp_path / "a.tar", range(3)), image_size=16, caption_column="key")[1]
    assert isinstance(item, Item)
    assert (item.image.shape, item.condition) == ((3, 16, 16), "00001")


def _raw(path: Path, header: tarfile.TarInfo, content: bytes = b"", form: int = tarfile.PAX_FORMAT) -> Path:
    """A shard of one whole sample and, before it, a header made by hand."""
    whole = write_tar(path, _members("a.png", "a.txt")).read_bytes()
    path.write_bytes(header.tobuf(form) + content + bytes(-len(content) % 512) + whole)
    return path


def test_names_and_headers_beyond_all_measure_are_refused(tmp_path: Path) -> None:
    """A name of 20 MB in a pax header, or one that claims to be 5 GB, costs neither memory nor time."""
    long = tarfile.TarInfo("x" * 20_000_000 + ".png")
    with pytest.raises(VarpiError, match=r"long\.tar: .* at byte 0 \(ReadError: a header of 20000\d+ bytes\)"):
        _open(_raw(tmp_path / "long.tar", long))
    with pytest.raises(VarpiError, match=r"middle\.tar: .* \(a name of 5004 characters\); no member is whole"):
        _open(_raw(tmp_path / "middle.tar", tarfile.TarInfo("x" * 5000 + ".png")))
    claim = tarfile.TarInfo("claim")
    claim.type, claim.size = tarfile.XHDTYPE, 5_000_000_000
    with pytest.raises(VarpiError, match=r"\(ReadError: a header of 500000\d+ bytes\)"):
        _open(_raw(tmp_path / "claim.tar", claim))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"18 size=abcdefghi\n", "at byte 1536 .no tar header"),
        (b"13 size=-1024\n", "at byte 0 .a.png has a negative si"),
    ],
)
def test_a_broken_first_header_is_said_in_a_line(records: bytes, message: str, tmp_path: Path) -> None:
    """A size below zero would lead back to itself for ever."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    with pytest.raises(VarpiError, match=f"a.tar: cut short or damaged {message}"):
        _open(_raw(tmp_path / "a.tar", header, records))


def test_a_header_that_no_tar_reads_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", _members("a.png", "a.txt"))
    monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", lambda archive: archive.undefined)  # whatever it raises
    with pytest.raises(
        VarpiError, match=r"a\.tar: cut short or damaged at byte 0 \(AttributeError: .*no member is whole"
    ):
        _open(path)


def test_parts_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": png(1), "a.json": b'{"caption": "a cat"}', "b.png": png(2)})
    monkeypatch.setattr("varpi.data.tars._LARGEST_TEXT", 10)
    shard = _open(path)
    with pytest.raises(BadImage, match=r"a\.tar/a: its json has 20 bytes; at most 10 are read"):
        shard[0]
    assert [sorted(parts) for _, parts in read_samples(str(path))] == [["image"], ["image"]]


def test_what_has_no_image_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {**_members("a.png", "a.txt"), "b.json": b"{}", "c.txt": b"c", "b.txt": b"b"}
    assert len(_open(write_tar(tmp_path / "a.tar", members))) == 1
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{tmp_path}/a.tar: left out 2 of 3 samples: 2 without an image ({tmp_path}/a.tar/b)"
    ]


@pytest.mark.parametrize("suffix", ["tif", "gif", "jfif", "ppm"])
def test_every_format_is_an_image_in_a_shard(suffix: str, tmp_path: Path) -> None:
    shard = _open(write_tar(tmp_path / "a.tar", {f"a.{suffix}": png(9), "a.txt": b"a"}))
    assert red_of(shard[0].image) == 9
