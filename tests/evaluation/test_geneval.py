"""GenEval's rules against recorded verdicts and by hand, its folders, and the whole evaluation with stubs."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import SHARED, WHICH
from golden import GOLDEN
from PIL import Image

from varpi.errors import VarpiError
from varpi.evaluation.detections import Found, read_detections, write_detections
from varpi.evaluation.geneval import (
    GENEVAL_TASKS,
    evaluate_geneval,
    judge_geneval,
    read_geneval_folder,
    write_geneval_folder,
)
from varpi.evaluation.result import differences, read_result, write_result

# -- rules


def test_recorded_verdicts() -> None:
    cases = json.loads((GOLDEN / "geneval_cases.json").read_text())
    assert len(cases) == 160
    for case in cases:
        verdict = judge_geneval(case["detections"], case["metadata"], case["colors"])
        assert verdict == (case["correct"], case["reason"]), case


def wants(*include: dict[str, Any], tag: str = "two_object", exclude: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": "a photo"}


def dogs(*scores: float) -> dict[str, list[list[float]]]:
    return {"dog": [[0, 0, 10, 10, score] for score in scores]}


def test_thresholds_are_exclusive() -> None:
    one = {"class": "dog", "count": 1}
    assert judge_geneval(dogs(0.3), wants(one), {}) == (False, "expected dog>=1, found 0")
    assert judge_geneval(dogs(0.3001), wants(one), {}) == (True, "")
    assert judge_geneval(dogs(0.9), wants(one, tag="counting"), {})[0] is False
    assert judge_geneval(dogs(0.9001), wants(one, tag="counting"), {})[0] is True
    assert judge_geneval({}, wants(one), {}) == (False, "expected dog>=1, found 0")


def test_too_many() -> None:
    metadata = wants({"class": "dog", "count": 2}, tag="counting", exclude=[{"class": "dog", "count": 3}])
    assert judge_geneval(dogs(0.95, 0.95), metadata, {}) == (True, "")
    assert judge_geneval(dogs(0.95, 0.95, 0.9), metadata, {}) == (True, "")  # the third does not count
    assert judge_geneval(dogs(0.95, 0.95, 0.95, 0.95), metadata, {}) == (False, "expected dog<3, found 4")
    both = wants({"class": "cat", "count": 1}, tag="counting", exclude=[{"class": "dog", "count": 1}])
    assert judge_geneval(dogs(0.95), both, {}) == (False, "expected cat>=1, found 0\nexpected dog<1, found 1")


def test_at_most_sixteen_of_a_class() -> None:
    metadata = wants({"class": "dog", "count": 17})
    assert judge_geneval(dogs(*[0.95] * 20), metadata, {}) == (False, "expected dog>=17, found 16")
    assert judge_geneval(dogs(*[0.95] * 20), wants({"class": "dog", "count": 16}), {}) == (True, "")


def test_colours_go_with_the_best_scores() -> None:
    red = wants({"class": "dog", "count": 1, "color": "red"}, tag="colors")
    assert judge_geneval(dogs(0.4, 0.8, 0.2), red, {"dog": ["blue", "red", "blue"]}) == (True, "")
    fault = "expected red dog>=1, found 0 red; and 1 blue"
    assert judge_geneval(dogs(0.4, 0.8), red, {"dog": ["red", "blue"]}) == (False, fault)
    assert judge_geneval(dogs(0.8, 0.8), red, {"dog": ["blue", "red"]}) == (True, "")  # of equal scores the later
    three = wants({"class": "dog", "count": 3, "color": "red"}, tag="colors")
    fault = "expected red dog>=3, found 1 red; and 1 red, 2 white"
    assert judge_geneval(dogs(0.4, 0.5, 0.6), three, {"dog": ["white", "red", "white"]}) == (False, fault)


def test_colours_that_nobody_looked_for() -> None:
    red = wants({"class": "dog", "count": 1, "color": "red"})
    for colors in ({}, {"dog": []}, {"dog": [None]}):
        with pytest.raises(VarpiError, match="colour of detection 0 of 'dog' is needed and not known"):
            judge_geneval(dogs(0.8), red, colors)
    assert judge_geneval(dogs(0.2), red, {}) == (False, "expected dog>=1, found 0")
    assert judge_geneval(dogs(0.8, 0.4), red, {"dog": ["red", None]}) == (True, "")


def placed(*boxes: tuple[float, float, float, float]) -> dict[str, list[list[float]]]:
    """The first is the cat's, the others are dogs'."""
    return {"cat": [[*boxes[0], 0.9]], "dog": [[*box, 0.9] for box in boxes[1:]]}


@pytest.mark.parametrize(
    ("dog", "relations"),
    [
        ((100, 0, 110, 10), "right of"),
        ((-100, 0, -90, 10), "left of"),
        ((0, 100, 10, 110), "below"),
        ((0, -100, 10, -90), "above"),
        ((100, 100, 110, 110), "right of and below"),
        ((-100, -100, -90, -90), "left of and above"),
        ((100, 50, 110, 60), "right of"),  # (98, 48) / 111.8: 0.88 and 0.43
        ((2, 0, 12, 10), ""),  # 2 - 0.1 * 20 = 0
        ((3, 3, 13, 13), ""),  # (1, 1) / 4.24
        ((4.5, 0, 14.5, 10), "right of"),  # 2.5 / 4.5 = 0.56
        ((4, 0, 14, 10), ""),  # 2 / 4 = 0.5, which is not more than 0.5
        ((0, 0, 10, 10), ""),
    ],
)
def test_directions(dog: tuple[float, float, float, float], relations: str) -> None:
    boxes = placed((0, 0, 10, 10), dog)
    for relation in ("left of", "right of", "above", "below"):
        metadata = wants(
            {"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}, tag="position"
        )
        fault = f"expected dog {relation} target, found {relations} target"
        right = relation in relations.split(" and ")
        assert judge_geneval(boxes, metadata, {}) == (right, "" if right else fault)


def test_every_pair_must_stand_so() -> None:
    metadata = wants({"class": "cat", "count": 1}, {"class": "dog", "count": 2, "position": ["right of", 0]})
    cat = (0, 0, 10, 10)
    assert judge_geneval(placed(cat, (100, 0, 110, 10), (200, 0, 210, 10)), metadata, {}) == (True, "")
    fault = "expected dog right of target, found left of target"
    assert judge_geneval(placed(cat, (100, 0, 110, 10), (-99, 0, -89, 10)), metadata, {}) == (False, fault)


def test_a_group_that_failed_is_no_target() -> None:
    metadata = wants(
        {"class": "cat", "count": 1, "color": "red"},
        {"class": "dog", "count": 1, "position": ["right of", 0]},
        {"class": "cow", "count": 1, "color": "red", "position": ["right of", 1]},
    )
    boxes = placed((0, 0, 10, 10), (100, 0, 110, 10)) | {"cow": [[0, 0, 10, 10, 0.9]]}
    reasons = [
        "expected red cat>=1, found 0 red; and 1 blue",
        "no target for dog to be right of",
        "no target for cow to be right of",
    ]
    colors = {"cat": ["blue"], "cow": ["red"]}
    assert judge_geneval(boxes, metadata, colors) == (False, "\n".join(reasons))
    # A wrong colour is reported alone, without the position
    reasons[2] = "expected red cow>=1, found 0 red; and 1 black"
    assert judge_geneval(boxes, metadata, colors | {"cow": ["black"]}) == (False, "\n".join(reasons))


# -- folders

METADATA = [
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
        "prompt": "a photo of two dogs",
    },
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"},
]


def images(prompts: int = 3, each: int = 4) -> np.ndarray:
    """Image i of prompt p is of the colour (p, i, 0) all over."""
    array = np.zeros((prompts, each, 6, 8, 3), dtype=np.uint8)
    array[..., 0] = np.arange(prompts)[:, None, None, None]
    array[..., 1] = np.arange(each)[:, None, None]
    return array


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_geneval_folder(tmp_path / "out", METADATA, images())
    return tmp_path / "out"


def official(tmp_path: Path, records: Sequence[Mapping[str, Any]] = METADATA) -> Path:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_folder_is_laid_out_as_geneval_reads_it(root: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == ["00000", "00001", "00002"]
    # As in evaluate_images.py: one JSON value in the file, image names of digits
    assert json.loads((root / "00001" / "metadata.jsonl").read_text()) == METADATA[1]
    names = sorted(path.name for path in (root / "00001" / "samples").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
    with Image.open(root / "00001" / "samples" / "0003.png") as image:
        assert np.asarray(image).tolist() == images()[1, 3].tolist()
    (root / "00001" / "grid.png").write_bytes(b"")
    (root / "00001" / "samples" / "notes.txt").write_bytes(b"")
    folders = read_geneval_folder(root, official(tmp_path))
    assert [folder.name for folder in folders] == ["00000", "00001", "00002"]
    assert [folder.metadata for folder in folders] == METADATA
    assert [path.name for path in folders[2].images] == names


def test_images_are_ordered_by_number(root: Path) -> None:
    for i, folder in enumerate(sorted(root.iterdir())):
        (folder / "samples" / "0001.png").rename(folder / "samples" / f"{10 if i else 9}.png")
    first, second, _ = read_geneval_folder(root)
    assert [path.name for path in first.images] == ["0000.png", "0002.png", "0003.png", "9.png"]
    assert [path.name for path in second.images] == ["0000.png", "0002.png", "0003.png", "10.png"]


def test_what_is_none_of_genevals_images_is_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pipes, links that lead back and links to nowhere too; a link to an image is one."""
    samples = root / "00001" / "samples"
    (samples / "notes.txt").write_bytes(b"")
    (samples / "best.png").write_bytes((samples / "0000.png").read_bytes())
    os.mkfifo(samples / "0004.png")
    (samples / "0005.png").symlink_to(samples / "0005.png")
    (samples / "back").symlink_to(root / "00001", target_is_directory=True)
    (samples / "0003.png").rename(root / "00001" / "elsewhere")
    (samples / "0003.png").symlink_to(root / "00001" / "elsewhere")
    found = read_geneval_folder(root)
    assert [path.name for path in found[1].images] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"{root}: left out 7 of 19 files: ")
    for reason in (
        f"3 not named as images are ({samples}/notes.txt)",
        f"2 no regular file, or not there ({samples}/0004.png)",
        f"1 a directory that was visited already ({samples}/back/samples)",
        f"1 not named as GenEval's images are ({samples}/best.png)",
    ):
        assert reason in said


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", ["orientation-6", "exif-garbage"])
def test_metadata_of_an_image_turn_it_or_do_nothing(name: str, which: str, tmp_path: Path) -> None:
    """The detector gets what every other route gets, upright; and the evaluation goes on."""
    folder = SHARED / "geneval" / name if which == "shared" else geneval_case(tmp_path, name)
    seen: list[Image.Image] = []

    class Eye:
        label, source, identity = "eye", "nowhere", {"model": "eye"}

        def __call__(self, image: Image.Image) -> tuple[dict[str, list[list[float]]], dict[str, np.ndarray]]:
            seen.append(image)
            mask = np.ones((1, image.height, image.width), dtype=bool)
            return {"bench": [[0.0, 0.0, float(image.width), float(image.height), 0.95]]}, {"bench": mask}

    result = evaluate_geneval(folder, detector=Eye())
    assert result.metrics == {"overall": 1.0, "single_object": 1.0}
    with Image.open(folder / "00000" / "samples" / "0000.png") as stored:
        pixels = np.asarray(stored.convert("RGB"))
    expected = np.rot90(pixels, -1) if name == "orientation-6" else pixels
    assert np.array_equal(np.asarray(seen[0]), expected)
    assert result.samples["image_size"] == [seen[0].height, seen[0].width]


def geneval_case(folder: Path, name: str) -> Path:
    """One image of a bench, whose metadata say that it lies on its side, or are bytes without a meaning."""
    record = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    (folder / "00000" / "samples").mkdir(parents=True)
    (folder / "00000" / "metadata.jsonl").write_text(json.dumps(record))
    exif: Any = bytes(range(40))
    if name == "orientation-6":
        exif = Image.Exif()
        exif[0x0112] = 6
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    Image.fromarray(pixels).save(folder / "00000" / "samples" / "0000.png", exif=exif)
    return folder


def test_writing_refuses(root: Path, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match="00000: is there already"):
        write_geneval_folder(root, METADATA, images())
    with pytest.raises(VarpiError, match="3 prompts and images of 2"):
        write_geneval_folder(tmp_path / "a", METADATA, images(2))
    with pytest.raises(VarpiError, match="3 prompts and images of at least 4"):
        write_geneval_folder(tmp_path / "b", METADATA, images(4))
    with pytest.raises(VarpiError, match="expected uint8"):
        write_geneval_folder(tmp_path / "c", METADATA, images().astype(float))


def break_image(root: Path) -> None:
    path = root / "00001" / "samples" / "0002.png"
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "00001").rename(root / "00009"), r"prompt folder 00001 is missing \(the next is 00002\)"),
        (lambda root: (root / "00000").rename(root / "first"), "prompt folder 00000 is missing"),
        (lambda root: (root / "00001" / "metadata.jsonl").unlink(), "00001/metadata.jsonl: cannot be read"),
        (lambda root: (root / "00001" / "metadata.jsonl").write_text("{}\n"), "00001/metadata.jsonl, line 1: has no"),
        (lambda root: official(root / "00001").rename(root / "00001" / "metadata.jsonl"), "holds 3 prompts; a folder"),
        (lambda root: (root / "00001" / "samples").rename(root / "00001" / "images"), "00001: holds no images"),
        (
            lambda root: (root / "00001" / "samples" / "0002.png").rename(root / "x"),
            "holds 3 images where 00000 holds 4",
        ),
        (lambda root: (root / "00001" / "samples" / "0002.png").write_bytes(b"x"), "0002.png: unreadable image"),
        (break_image, "0002.png: unreadable image"),
    ],
)
def test_reading_refuses(spoil: Callable[[Path], object], message: str, root: Path) -> None:
    spoil(root)
    with pytest.raises(VarpiError, match=message):
        read_geneval_folder(root)


def test_reading_refuses_what_is_no_such_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(VarpiError, match="holds no prompt folders; expected GenEval's layout"):
            read_geneval_folder(path)


def test_prompts_must_be_those_of_the_official_file(root: Path, tmp_path: Path) -> None:
    reordered = [dict(reversed(record.items())) for record in METADATA[::-1]]
    assert len(read_geneval_folder(root, official(tmp_path, reordered))) == 3
    more = {**METADATA[0], "prompt": "a photo of a big dog"}
    with pytest.raises(VarpiError, match=r"1 of the 4 prompts of .* have no folder, 'a photo of a big dog' for one"):
        read_geneval_folder(root, official(tmp_path, [*METADATA, more]))
    changed = {**METADATA[1], "exclude": []}
    with pytest.raises(
        VarpiError, match=r"00001.metadata.jsonl: is not one of the 3 prompts of .*'a photo of two dogs'"
    ):
        read_geneval_folder(root, official(tmp_path, [METADATA[0], changed, METADATA[2]]))
    (root / "00002" / "metadata.jsonl").write_text(json.dumps(METADATA[0]))
    with pytest.raises(VarpiError, match="folders 00000 and 00002 hold the same prompt"):
        read_geneval_folder(root, official(tmp_path))


# -- the whole


class Stub:
    """Sees in image i, of the colour (prompt, i, 0), i dogs, one above the other."""

    label, source, identity = "stub", "nowhere", {"model": "stub"}

    def __call__(self, image: Image.Image) -> tuple[dict[str, list[list[float]]], dict[str, np.ndarray]]:
        pixel = image.getpixel((0, 0))
        assert isinstance(pixel, tuple)
        count = int(pixel[1])
        boxes = [[0.0, float(i), 8.0, float(i + 1), 0.95 - 0.01 * i] for i in range(count)]
        masks = np.stack([np.arange(6)[:, None].repeat(8, axis=1) == i for i in range(count)] or [np.zeros((6, 8))])
        return ({"dog": boxes}, {"dog": masks.astype(bool)}) if count else ({}, {})


class Colors:
    """Sees the first object of an image red when there are two or more, all others blue."""

    source, identity = "nowhere", {"model": "colors"}

    def __call__(self, image: Image.Image, name: str, boxes: Any, masks: np.ndarray) -> list[str]:
        assert name == "dog"
        assert masks.sum(axis=(1, 2)).tolist() == [8] * len(boxes)
        return ["red" if len(boxes) > 1 and i == 0 else "blue" for i in range(len(boxes))]


# Images 0..3 hold as many dogs: right are 3 of 4 ("a dog"), 1 of 4 ("two dogs"), 2 of 4 ("a red dog")
SCORES = {"overall": 0.5, "single_object": 0.75, "counting": 0.25, "colors": 0.5}


def test_scores_by_hand(root: Path, tmp_path: Path) -> None:
    (root / "sample.json").write_text(json.dumps({"seed": 3, "prompts": ["a"] * 12}))
    result = evaluate_geneval(
        root,
        detector=Stub(),
        colorist=Colors(),
        metadata=official(tmp_path),
        cache=tmp_path / "cache.jsonl",
        save=tmp_path / "found.json",
    )
    assert result.kind == "geneval"
    assert result.metrics == SCORES
    assert list(result.metrics) == ["overall", *(task for task in GENEVAL_TASKS if task in SCORES)]
    assert result.details["tasks"]["counting"] == {
        "prompts": 1,
        "prompts_with_a_correct_image": 1,
        "images": 4,
        "correct": 1,
    }
    assert result.details["prompts"][1] == {
        "folder": "00001",
        "prompt": "a photo of two dogs",
        "task": "counting",
        "images": 4,
        "correct": 1,
        "reasons": {
            "0000.png": "expected dog>=2, found 0",
            "0001.png": "expected dog>=2, found 1",
            "0003.png": "expected dog<3, found 3",
        },
    }
    assert result.sampling == {"seed": 3}
    samples = {key: result.samples[key] for key in ("count", "image_size", "images_per_prompt")}
    assert samples == {"count": 12, "image_size": [6, 8], "images_per_prompt": 4}
    assert result.evaluator["name"] == "GenEval (stub)"
    assert result.evaluator["detector"] == {"model": "stub"}
    assert result.evaluator["counting_threshold"] == 0.9
    assert [warning.split(":")[0] for warning in result.warnings] == [
        "no prompts of the task two_object, position, color_attr",
        "detections by stub, not by GenEval's own detector (mmdet's Mask2Former)",
    ]
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json").metrics == SCORES

    # The same detections from the file that was saved, under longer paths
    found = read_detections(tmp_path / "found.json")
    assert found["00002/samples/0002.png"].colors == {"dog": ["red", "blue"]}
    write_detections(tmp_path / "official.json", {f"/somewhere/{name}": one for name, one in found.items()})
    again = evaluate_geneval(root, detections=tmp_path / "official.json")
    assert again.metrics == SCORES
    assert again.details == result.details
    assert again.reference is not None
    assert result.reference is not None
    assert again.reference["sha256"] == result.reference["sha256"]
    assert again.evaluator["name"] == "GenEval (detections from official.json)"
    assert "the official metadata file was not given: prompts may be missing or changed" in again.warnings
    with pytest.raises(VarpiError, match="another evaluator"):
        differences({"ours": result, "theirs": again})


def test_overall_is_the_mean_of_tasks_not_of_prompts(tmp_path: Path) -> None:
    metadata = [METADATA[0], {**METADATA[0], "prompt": "a picture of a dog"}, METADATA[1]]
    write_geneval_folder(tmp_path / "out", metadata, images())
    result = evaluate_geneval(tmp_path / "out", detector=Stub())
    assert result.metrics == {"overall": 0.5, "single_object": 0.75, "counting": 0.25}
    assert result.details["tasks"]["single_object"]["prompts"] == 2
    assert result.details["tasks"]["single_object"]["correct"] == 6


def test_two_images_a_prompt_are_remarked_on(tmp_path: Path) -> None:
    write_geneval_folder(tmp_path / "out", METADATA[:1], images(1, 2))
    result = evaluate_geneval(tmp_path / "out", detector=Stub())
    assert result.metrics == {"overall": 0.5, "single_object": 0.5}
    assert "2 images a prompt; GenEval's protocol has 4" in result.warnings


def test_same_samples_and_prompts_compare(root: Path, tmp_path: Path) -> None:
    first = evaluate_geneval(root, detector=Stub(), colorist=Colors(), metadata=official(tmp_path))
    root.rename(tmp_path / "elsewhere")
    second = evaluate_geneval(tmp_path / "elsewhere", detector=Stub(), colorist=Colors())
    assert differences({"a": first, "b": second}) == []
    assert first.samples["sha256"] == second.samples["sha256"]
    path = tmp_path / "elsewhere" / "00000" / "samples" / "0000.png"
    path.write_bytes((path.parent / "0001.png").read_bytes())
    third = evaluate_geneval(tmp_path / "elsewhere", detector=Stub(), colorist=Colors())
    assert third.samples["sha256"] != second.samples["sha256"]
    assert third.metrics["single_object"] == 1.0


def test_contradictory_arguments(root: Path, tmp_path: Path) -> None:
    write_detections(tmp_path / "found.json", {})
    with pytest.raises(VarpiError, match="either a detector or a file of detections"):
        evaluate_geneval(root)
    with pytest.raises(VarpiError, match="either a detector or a file of detections"):
        evaluate_geneval(root, detector=Stub(), detections=tmp_path / "found.json")
    with pytest.raises(VarpiError, match="for detections that are made here"):
        evaluate_geneval(root, detections=tmp_path / "found.json", cache=tmp_path / "cache.jsonl")
    with pytest.raises(VarpiError, match="give a colorist too"):
        evaluate_geneval(root, detector=Stub())


def test_files_of_detections_that_do_not_do(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    names = [f"{p:05d}/samples/{i:04d}.png" for p in range(3) for i in range(4)]
    found = dict.fromkeys(names, Found({"dog": [[0, 0, 4, 4, 0.95]]}, {"dog": ["red"]}))
    write_detections(path, found)
    assert evaluate_geneval(root, detections=path).metrics["colors"] == 1.0
    write_detections(path, found | {names[5]: Found({"doggy": []}, {})})
    with pytest.raises(VarpiError, match=r"00001/samples/0001.png: GenEval knows no class 'doggy'; use its names"):
        evaluate_geneval(root, detections=path)
    write_detections(path, found | {names[9]: Found({"dog": [[0, 0, 4, 4, 0.95]]}, {})})
    with pytest.raises(VarpiError, match=r"00002/samples/0001.png: the colour of detection 0 of 'dog' is needed"):
        evaluate_geneval(root, detections=path)
    write_detections(path, {name: one for name, one in found.items() if name != names[3]})
    with pytest.raises(VarpiError, match=r"found.json\): there are no detections of 00000/samples/0003.png"):
        evaluate_geneval(root, detections=path)
