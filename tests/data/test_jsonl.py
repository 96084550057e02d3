import json
import os
from pathlib import Path

import pytest
from shards import png, red_of

from varpi.data import BadImage, Batches, Dropped, open_dataset
from varpi.data.jsonl import JsonLines
from varpi.errors import VarpiError


def _write(path: Path, lines: list) -> Path:
    """One line each; bytes as they are, other values as JSON."""
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def _line(red: int, folder: Path, **fields) -> dict:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "images" / f"{red}.png").write_bytes(png(red))
    return {"image_path": f"images/{red}.png", "text": [f"red {red}", f"long red {red}"], **fields}


def test_files_in_the_order_of_their_names_and_keys_by_line(tmp_path: Path) -> None:
    absolute = _line(3, tmp_path) | {"image_path": str(tmp_path / "images" / "3.png")}
    _write(tmp_path / "b.jsonl", [_line(2, tmp_path), b"", b"\r", absolute, b""])
    _write(tmp_path / "a.jsonl", [_line(1, tmp_path)])
    lines = open_dataset(tmp_path, image_size=16)
    assert [red_of(lines[index].image) for index in range(len(lines))] == [1, 2, 3]
    assert [lines[index].condition for index in range(3)] == ["red 1", "red 2", "red 3"]
    assert [lines.key(index) for index in range(3)] == ["a/0", "b/0", "b/3"]
    assert (lines.num_classes, lines.class_names) == (None, None)
    assert open_dataset(tmp_path / "b.jsonl", image_size=16).caption(1) == "red 3"


def test_which_caption(tmp_path: Path) -> None:
    _write(tmp_path / "a.jsonl", [_line(1, tmp_path, text=[" ", "second"]), _line(2, tmp_path, text="plain")])
    assert [JsonLines([tmp_path / "a.jsonl"], image_size=16).caption(index) for index in range(2)] == [
        "second",
        "plain",
    ]
    lines = open_dataset(tmp_path, image_size=16, caption_column=["text.1"])
    assert lines.caption(0) == "second"
    with pytest.raises(Dropped, match=r"a\.jsonl:2: no usable caption"):
        lines.caption(1)


def test_lines_that_cannot_be_used(tmp_path: Path) -> None:
    good = _line(1, tmp_path)
    lines = [good, b'{"image_path": "cut', b"[1]", {"text": "no image"}, {**good, "image_path": ""}]
    lines += [{**good, "text": []}, {**good, "text": "half \ud83d"}, '{"text": "grün"}'.encode("latin-1")]
    lines += [{**good, "image_path": "images/absent.png"}, {**good, "image_path": "images/\0.png"}]
    (tmp_path / "images" / "small.png").write_bytes(png(1, (40, 15)))
    lines += [{**good, "image_path": "images/small.png"}, *[good] * 9]
    listed = JsonLines([_write(tmp_path / "a.jsonl", lines)], image_size=16, min_side=16)
    reasons = ["not a JSON object", "not a JSON object", "no image_path", "no image_path", "no usable caption"]
    reasons += ["no usable caption", "not a JSON object", None, "no image_path", "40x15 pixels; .* must have 16"]
    for index, reason in enumerate(reasons, start=1):
        if reason is not None:
            with pytest.raises(Dropped, match=rf"a\.jsonl:{index + 1}.*: .*{reason}"):
                listed[index]
    with pytest.raises(BadImage, match=r"a\.jsonl:9 \(images/absent\.png\): unreadable image .*No such file"):
        listed[8]
    batches = Batches(listed, batch_size=20, seed=0, max_bad_fraction=1)
    assert set(batches.at(0).indices.tolist()) <= {0, *range(11, 20)}
    assert batches.dropped >= 9
    assert batches.bad >= 1


def test_lines_across_the_chunks_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.jsonl", [_line(red, tmp_path, text="grün" * red) for red in range(1, 30)])
    whole = JsonLines([tmp_path / "a.jsonl"], image_size=16)
    monkeypatch.setattr("varpi.data.jsonl._CHUNK", 7)
    parts = JsonLines([tmp_path / "a.jsonl"], image_size=16)
    assert [parts.caption(index) for index in range(29)] == ["grün" * red for red in range(1, 30)]
    assert parts.fingerprint == whole.fingerprint


def test_fingerprint_follows_the_text(tmp_path: Path) -> None:
    def fingerprint(**fields) -> str:
        return JsonLines([_write(tmp_path / "a.jsonl", [_line(1, tmp_path, **fields)])], image_size=16).fingerprint

    assert fingerprint(text="cat") == fingerprint(text="cat")
    assert fingerprint(text="cat") != fingerprint(text="dog")


def test_files_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=r"a\.jsonl: no images; the files have no lines"):
        JsonLines([_write(tmp_path / "a.jsonl", [b"", b""])], image_size=16)
    with pytest.raises(VarpiError, match=r"b\.jsonl: cannot be read \(No such file"):
        JsonLines([tmp_path / "b.jsonl"], image_size=16)
    (tmp_path / "other").mkdir()
    twins = [_write(folder / "c.jsonl", [_line(1, tmp_path)]) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(VarpiError, match=r"c\.jsonl and .*other/c\.jsonl have the same name"):
        JsonLines(twins, image_size=16).key(0)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_lines_of_mere_whitespace_are_no_items(chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varpi.data.jsonl._CHUNK", chunk)
    one, two = (json.dumps(_line(red, tmp_path)).encode() for red in (1, 2))
    for name, content in {
        "blank": one + b"\n   \n\t\n" + two + b"\n  ",
        "windows": b"\xef\xbb\xbf" + one + b"\r\n\r\n \r\n" + two + b"\r\n",
    }.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        lines = JsonLines([tmp_path / f"{name}.jsonl"], image_size=16)
        assert [red_of(lines[index].image) for index in range(len(lines))] == [1, 2]
        assert lines.key(1) == f"{name}/3"  # the number of the line in the file, blank ones counted


def test_lines_that_cost_too_much_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = b'{"image_path": "x.png", "text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    lines = JsonLines([_write(tmp_path / "a.jsonl", [deep, _line(1, tmp_path)])], image_size=16)
    with pytest.raises(Dropped, match=r"a\.jsonl:1: not a JSON object"):
        lines[0]
    monkeypatch.setattr("varpi.data.jsonl._LONGEST_LINE", 60)
    with pytest.raises(Dropped, match=r"a\.jsonl:2: has \d+ bytes; at most 60 are read"):
        lines[1]


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(VarpiError, match=r"a\.jsonl: cannot be read \(not a regular file\)"):
        JsonLines([tmp_path / "a.jsonl"], image_size=16)
