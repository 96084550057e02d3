"""What detectors saw: files of it, and the cache that it is kept in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from varpi.errors import VarpiError
from varpi.evaluation.detections import Found, detect, read_detections, write_detections

FOUND = Found({"dog": [[1.0, 2.0, 3.0, 4.0, 0.5]], "cat": []}, {"dog": ["red"]})


def test_detections_to_a_file_and_back(tmp_path: Path) -> None:
    found = {"00000/samples/0000.png": FOUND, "00000/samples/0001.png": Found({}, {})}
    write_detections(tmp_path / "found.json", found)
    assert read_detections(tmp_path / "found.json") == found
    longer = {f"/data/out/{name}": {"detections": one.detections} for name, one in found.items()}
    (tmp_path / "longer.json").write_text(json.dumps(longer))
    assert read_detections(tmp_path / "longer.json") == {k: Found(v.detections, {}) for k, v in found.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as a JSON file of detections"),
        ("[]", "is a JSON list; expected an object with a key for each image"),
        ('{"a": {}}', "a: has no detections"),
        ('{"a": {"detections": {"dog": [[1, 2, 3, 4]]}}}', r"'dog' has the box \[1, 2, 3, 4\]; expected \[x1"),
        ('{"a": {"detections": {"dog": [[1, 2, 3, 4, NaN]]}}}', "'dog' has the box"),
        ('{"a": {"detections": {"dog": 3}}}', "'dog' has the box 3"),
        ('{"a": {"detections": {"dog": []}, "colors": {"dog": ["red"]}}}', "one for each of its boxes"),
        ('{"a": {"detections": {}, "colors": ["red"]}}', "one for each of its boxes"),
        ('{"a": {"detections": {"d": [[1, 2, 3, 4, 1]]}, "colors": {"d": ["mauve"]}}}', "'mauve' is none of GenEval's"),
        (f'{{"{"n" * 999}": {{"detections": {{}}, "colors": {{"{"d" * 999}": 3}}}}}}', "^.{1,600}$"),
        (f'{{"a": {{"detections": {{"d": {[[0] * 999]}}}}}}}', "^.{1,400}$"),
        ('{"x/a/b/c": {"detections": {}}, "y/a/b/c": {"detections": {}}}', "two images with the same last three parts"),
    ],
)
def test_files_that_hold_no_detections(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text(content)
    with pytest.raises(VarpiError, match=message):
        read_detections(tmp_path / "found.json")
    with pytest.raises(VarpiError, match="cannot be read"):
        read_detections(tmp_path / "absent.json")


def save(path: Path, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


class Stub:
    """Sees one dog in every image; red, if asked."""

    label, source = "stub", "nowhere"

    def __init__(self, fail_at: int = 1000, version: int = 1) -> None:
        self.identity = {"version": version, "sizes": (1, 2)}
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, image: Image.Image) -> tuple[dict[str, list[list[float]]], dict[str, np.ndarray]]:
        self.calls += 1
        if self.calls > self.fail_at:
            raise KeyboardInterrupt
        box = [0.0, 0.0, float(image.width), float(image.height), 0.95]
        return {"dog": [box]}, {"dog": np.ones((1, image.height, image.width), dtype=bool)}


class Red:
    source, identity = "nowhere", {"color": "red"}

    def __call__(self, image: Image.Image, name: str, boxes: Any, masks: np.ndarray) -> list[str]:
        assert masks.shape == (len(boxes), image.height, image.width)
        return ["red"] * len(boxes)


@pytest.fixture
def images(tmp_path: Path) -> dict[Path, set[str]]:
    paths = {}
    for i in range(4):
        save(tmp_path / f"{i}.png", 8 + i, seed=i)
        paths[tmp_path / f"{i}.png"] = {"dog", "cat"} if i == 3 else set()
    return paths


def test_detection_goes_on_where_it_stopped(images: dict[Path, set[str]], tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    expected = detect(tmp_path, images, detector=Stub(), colorist=Red())
    assert list(expected) == [f"{i}.png" for i in range(4)]
    assert expected["1.png"] == Found({"dog": [[0.0, 0.0, 9.0, 8.0, 0.95]]}, {})
    assert expected["3.png"].colors == {"cat": [], "dog": ["red"]}
    with pytest.raises(KeyboardInterrupt):
        detect(tmp_path, images, detector=Stub(fail_at=2), colorist=Red(), cache=cache)
    cache.write_text(cache.read_text() + '{"image": "2.p')  # the process died in the middle of a line
    stub = Stub()
    assert detect(tmp_path, images, detector=stub, colorist=Red(), cache=cache) == expected
    assert stub.calls == 2
    stub = Stub(fail_at=0)
    assert detect(tmp_path, images, detector=stub, colorist=Red(), cache=cache) == expected
    assert len(cache.read_text().splitlines()) == 5

    save(tmp_path / "0.png", 8, seed=9)  # another image, and colours that nobody looked for yet
    images[tmp_path / "1.png"] = {"dog"}
    stub = Stub()
    found = detect(tmp_path, images, detector=stub, colorist=Red(), cache=cache)
    assert stub.calls == 2
    assert found["1.png"].colors == {"dog": ["red"]}
    assert detect(tmp_path, images, detector=Stub(fail_at=0), colorist=Red(), cache=cache) == found


def test_caches_that_are_refused(images: dict[Path, set[str]], tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    detect(tmp_path, images, detector=Stub(), colorist=Red(), cache=cache)
    with pytest.raises(VarpiError, match="holds the detections of another detector or colorist"):
        detect(tmp_path, images, detector=Stub(version=2), colorist=Red(), cache=cache)
    lines = cache.read_text().splitlines()
    for bad in ("{", '{"image": "2.png"}', '{"image": "2.png", "sha256": "", "detections": 3}', "3"):
        cache.write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n")
        with pytest.raises(VarpiError, match=r"cache\.jsonl: "):
            detect(tmp_path, images, detector=Stub(), colorist=Red(), cache=cache)
    cache.write_text("")
    with pytest.raises(VarpiError, match="another detector"):
        detect(tmp_path, images, detector=Stub(), colorist=Red(), cache=cache)


def test_colours_need_a_colorist(images: dict[Path, set[str]], tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match="ask for colours: give a colorist too"):
        detect(tmp_path, images, detector=Stub())
    assert detect(tmp_path, {path: set() for path in images}, detector=Stub())["3.png"].colors == {}
