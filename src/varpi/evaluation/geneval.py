"""GenEval: whether an image shows the objects, colours and places that its prompt asks for.

Ghosh et al. 2023 (arXiv 2310.11513); the rules are those of the original's evaluate_images.py and summary_scores.py.
The rules know no model: they judge detections, which `varpi.evaluation.detections` makes or reads.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from varpi.data.images import decode
from varpi.data.left_out import LeftOut
from varpi.data.listing import directories, list_images
from varpi.data.prompts import GENEVAL_COLORS, GENEVAL_TASKS, read_geneval_metadata
from varpi.data.scenes import SHAPES
from varpi.errors import VarpiError
from varpi.evaluation.detections import (
    Boxes,
    Colorist,
    Colors,
    Detector,
    Found,
    detect,
    read_detections,
    write_detections,
)
from varpi.evaluation.result import Result
from varpi.networks.mask2former import OBJECT_NAMES
from varpi.runtime.files import write_text
from varpi.samples.images import save_png
from varpi.samples.reading import read_sampling
from varpi.weights import sha256_of

IMAGES_PER_PROMPT = 4
SETTINGS = {"threshold": 0.3, "counting_threshold": 0.9, "max_objects": 16, "position_threshold": 0.1}
"""Score above which a detection counts, and that for the task counting; detections of a class at most; the share of
two objects' sizes by which their distance is shortened before it has a direction."""


class PromptFolder(NamedTuple):
    """The images of one prompt."""

    name: str
    metadata: dict[str, Any]
    images: list[Path]


# -- rules


def judge_geneval(detections: Boxes, metadata: Mapping[str, Any], colors: Colors) -> tuple[bool, str]:
    """Whether an image with these detections is what its prompt asks for, and if not, why, a line for each fault.

    detections: raw, in any order; only scores above 0.3 count (0.9 for counting), at most 16 of a class.
    metadata: a line of GenEval's, see `read_geneval_metadata`.
    colors: needed of the classes for which metadata asks a colour.

    Only the `count` best-scored detections of a class are looked at; of equal scores the later comes first, as in the
    original. Where one box stands in two directions from another, the reason names the horizontal one first (the
    original's order is that of a set of strings, which changes from run to run).

    Raises VarpiError when a colour is needed that nobody looked for.
    """
    kept = {name: _best(boxes, metadata["tag"] == "counting") for name, boxes in detections.items()}
    reasons: list[str] = []
    groups: list[list[Sequence[float]] | None] = []
    for wanted in metadata["include"]:
        name = wanted["class"]
        best = kept.get(name, [])[: wanted["count"]]
        boxes = [detections[name][i] for i in best]
        seen = [_color(colors, name, i) for i in best] if "color" in wanted else []
        fault = _fault(wanted, boxes, seen, groups)
        groups.append(None if fault else boxes)
        reasons += [fault] if fault else []
    for unwanted in metadata.get("exclude", []):
        name, count = unwanted["class"], unwanted["count"]
        if len(kept.get(name, [])) >= count:
            reasons.append(f"expected {name}<{count}, found {len(kept[name])}")
    return not reasons, "\n".join(reasons)


def _best(boxes: Sequence[Sequence[float]], counting: bool) -> list[int]:
    """The indices of the detections that count, best score first."""
    threshold = SETTINGS["counting_threshold" if counting else "threshold"]
    order = sorted(range(len(boxes)), key=lambda i: (boxes[i][4], i), reverse=True)
    return [i for i in order if boxes[i][4] > threshold][: int(SETTINGS["max_objects"])]


def _color(colors: Colors, name: str, index: int) -> str:
    seen = colors.get(name, ())
    color = seen[index] if index < len(seen) else None
    if color is None:
        raise VarpiError(f"the colour of detection {index} of {name!r} is needed and not known; have it looked for")
    return color


def _fault(
    wanted: Mapping[str, Any],
    boxes: list[Sequence[float]],
    colors: list[str],
    groups: list[list[Sequence[float]] | None],
) -> str:
    """What is wrong with the objects found for one demand; empty when nothing is. groups: those of earlier demands."""
    name, count = wanted["class"], wanted["count"]
    if len(boxes) < count:
        return f"expected {name}>={count}, found {len(boxes)}"
    if "color" in wanted:
        color, seen = wanted["color"], Counter(colors)
        if seen[color] < count:
            shown = ", ".join(f"{seen[one]} {one}" for one in GENEVAL_COLORS if seen[one])
            return f"expected {color} {name}>={count}, found {seen[color]} {color}; and {shown}"
    if "position" in wanted:
        relation, target = wanted["position"]
        group = groups[target]
        if group is None:
            return f"no target for {name} to be {relation}"
        for box in boxes:
            for other in group:
                relations = _relations(box, other)
                if relation not in relations:
                    return f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return ""


def _relations(box: Sequence[float], target: Sequence[float]) -> list[str]:
    """Where `box` stands as seen from `target`: none, one or two of the four directions."""
    offsets, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        offset = (box[low] + box[high] - target[low] - target[high]) / 2
        sizes = abs(box[high] - box[low]) + abs(target[high] - target[low])
        offsets.append(offset)
        shortened.append(math.copysign(max(abs(offset) - SETTINGS["position_threshold"] * sizes, 0), offset))
    if all(abs(part) < 1e-3 for part in shortened):
        return []
    horizontal, vertical = (part / math.hypot(*offsets) for part in shortened)
    relations = []
    if abs(horizontal) > 0.5:
        relations.append("left of" if horizontal < 0 else "right of")
    if abs(vertical) > 0.5:
        relations.append("above" if vertical < 0 else "below")
    return relations


# -- folders


def prompt_folders(root: Path) -> list[Path]:
    """The directories in `root` that are named by a number, in its order; those of GenEval's layout are."""
    names = [name for name in directories(root) if name.isdecimal()] if root.is_dir() else []
    return [root / name for name in sorted(names, key=int)]


def folder_images(folder: Path, left_out: LeftOut) -> list[Path]:
    """The images of one prompt, samples/<digits>.png in order of number.

    left_out: where other files in samples/ are counted.

    Raises VarpiError when there is none, or for one that cannot be read.
    """
    samples, images = folder / "samples", []
    for path in map(Path, list_images(samples, left_out) if samples.is_dir() else []):
        if path.parent == samples and re.fullmatch(r"\d+\.png", path.name):
            images.append(path)
        else:
            left_out.add("not named as GenEval's images are", str(path))
    if not images:
        raise VarpiError(f"{folder}: holds no images; expected samples/0000.png and so on")
    for path in images:
        decode(path, str(path))
    return sorted(images, key=lambda path: (int(path.stem), path.stem))


def read_geneval_folder(root: str | Path, metadata: str | Path | None = None) -> list[PromptFolder]:
    """Images in GenEval's layout, by folder: `root`/00000/metadata.jsonl (one line) and samples/0000.png and so on.

    metadata: the official evaluation_metadata.jsonl; each of its lines must then have one folder.

    Raises VarpiError for folders that are missing, that hold no image, an unreadable one or another number of them
    than the first, and for metadata that is not GenEval's or not in the file.
    """
    root = Path(root).expanduser()
    found = prompt_folders(root)
    if not found:
        raise VarpiError(f"{root}: holds no prompt folders; expected GenEval's layout, 00000/metadata.jsonl and so on")
    for number, path in enumerate(found):
        if int(path.name) != number:
            raise VarpiError(f"{root}: prompt folder {number:05d} is missing (the next is {path.name})")
    prompts, left_out = [], LeftOut()
    for path in found:
        records = read_geneval_metadata(path / "metadata.jsonl")
        if len(records) != 1:
            raise VarpiError(f"{path / 'metadata.jsonl'}: holds {len(records)} prompts; a folder has one")
        prompts.append(PromptFolder(path.name, records[0], folder_images(path, left_out)))
        if len(prompts[-1].images) != len(prompts[0].images):
            raise VarpiError(
                f"{path}: holds {len(prompts[-1].images)} images where {found[0].name} holds {len(prompts[0].images)}; "
                "every prompt needs as many"
            )
    left_out.say(str(root), sum(len(prompt.images) for prompt in prompts) + len(left_out), "files")
    if metadata is not None:
        _compare(root, prompts, Path(metadata).expanduser())
    return prompts


def _compare(root: Path, prompts: list[PromptFolder], metadata: Path) -> None:
    """Refuse folders that are not those of the official file, each once."""
    expected = {_rules(record): record["prompt"] for record in read_geneval_metadata(metadata)}
    seen: dict[str, str] = {}
    for prompt in prompts:
        rules = _rules(prompt.metadata)
        if rules not in expected:
            raise VarpiError(
                f"{root / prompt.name / 'metadata.jsonl'}: is not one of the {len(expected)} prompts of {metadata} "
                f"({prompt.metadata['prompt']!r})"
            )
        if rules in seen:
            raise VarpiError(f"{root}: folders {seen[rules]} and {prompt.name} hold the same prompt")
        seen[rules] = prompt.name
    missing = [text for rules, text in expected.items() if rules not in seen]
    if missing:
        lacking = f"{len(missing)} of the {len(expected)} prompts of {metadata}"
        raise VarpiError(f"{root}: {lacking} have no folder, {missing[0]!r} for one")


def _rules(record: Mapping[str, Any]) -> str:
    """What a line of metadata asks for, whatever the order of its keys."""
    return json.dumps({key: record.get(key, []) for key in ("prompt", "tag", "include", "exclude")}, sort_keys=True)


def write_geneval_folder(root: str | Path, metadata: Sequence[Mapping[str, Any]], images: Iterable[np.ndarray]) -> None:
    """Write images in GenEval's layout, as its own evaluation reads it.

    metadata: a record a prompt; images: as many arrays, uint8 (images of the prompt, H, W, 3), taken one at a time.

    Raises VarpiError when their numbers differ, for a folder that is there already, or other arrays.
    """
    root, count = Path(root), 0
    for count, batch in enumerate(images, 1):
        if count > len(metadata):
            break
        folder = root / f"{count - 1:05d}"
        if folder.exists():
            raise VarpiError(f"{folder}: is there already; choose another directory")
        write_text(folder / "metadata.jsonl", json.dumps(metadata[count - 1]) + "\n", sync=False)
        for i, image in enumerate(batch):
            save_png(folder / "samples" / f"{i:04d}.png", image, sync=False)
    os.sync()  # once for all files
    if count != len(metadata):
        more = "at least " if count > len(metadata) else ""
        raise VarpiError(f"{root}: {len(metadata)} prompts and images of {more}{count}; every prompt needs its images")


# -- the whole


def evaluate_geneval(
    root: str | Path,
    *,
    detector: Detector | None = None,
    colorist: Colorist | None = None,
    detections: str | Path | None = None,
    metadata: str | Path | None = None,
    cache: str | Path | None = None,
    save: str | Path | None = None,
    progress: bool = False,
) -> Result:
    """Score images in GenEval's layout: the share that is right by task, and `overall`, the plain mean of the tasks'.

    Either a detector looks at the images (with a `colorist`, for prompts that ask for colours), or `detections` is a
    file of what one saw (`read_detections`), such as the official detector's.

    root: see `read_geneval_folder`.
    metadata: the official file, without which nobody knows whether prompts are missing.
    cache, progress: see `detect`. save: a file for the detections made, in the form of `read_detections`.

    Raises VarpiError as the functions named, and for a file without the detections of some image.
    """
    root = Path(root).expanduser()
    if (detector is None) == (detections is None):
        raise VarpiError("GenEval needs either a detector or a file of detections")
    if detector is None and (cache is not None or save is not None):
        raise VarpiError("a cache and a file to save are for detections that are made here, not read from a file")
    prompts = read_geneval_folder(root, metadata)
    if detector is not None:
        asked = {path: _asked_colors(prompt) for prompt in prompts for path in prompt.images}
        found = detect(root, asked, detector=detector, colorist=colorist, cache=cache, progress=progress)
        if save is not None:
            write_detections(save, found)
        evaluator = {
            "name": f"GenEval ({detector.label})",
            "detector": dict(detector.identity),
            "colorist": dict(colorist.identity) if colorist else None,
            **SETTINGS,
            "source": {"detector": detector.source, "colorist": colorist.source if colorist else None},
        }
    else:
        assert detections is not None
        path = Path(detections).expanduser()
        found = read_detections(path)
        evaluator = {
            "name": f"GenEval (detections from {path.name})",
            **SETTINGS,
            "source": {"detections": str(path), "sha256": sha256_of(path)},
        }
    _check_classes(prompts, found, evaluator["name"])
    judged = [_judge_prompt(root, prompt, found, evaluator["name"]) for prompt in prompts]
    tasks = _by_task(judged)
    scores = {task: numbers["correct"] / numbers["images"] for task, numbers in tasks.items()}
    images = [path for prompt in prompts for path in prompt.images]
    width, height = decode(images[0], str(images[0])).size
    return Result(
        kind="geneval",
        metrics={"overall": math.fsum(scores.values()) / len(scores), **scores},
        samples={
            "source": str(root),
            "sha256": digest_of(f"{path.relative_to(root).as_posix()} {sha256_of(path)}" for path in images),
            "count": len(images),
            "image_size": [height, width],
            "images_per_prompt": len(prompts[0].images),
        },
        sampling=sampling_settings(read_sampling(root, len(images))),
        reference={
            "source": str(metadata) if metadata is not None else str(root),
            "sha256": digest_of(sorted(_rules(prompt.metadata) for prompt in prompts)),
            "count": len(prompts),
        },
        evaluator=evaluator,
        warnings=_warnings(scores, len(prompts[0].images), metadata is not None, detector),
        details={"tasks": tasks, "prompts": judged},
    )


def _asked_colors(prompt: PromptFolder) -> set[str]:
    """The classes for which a prompt asks a colour."""
    return {wanted["class"] for wanted in prompt.metadata["include"] if "color" in wanted}


def _check_classes(prompts: Sequence[PromptFolder], found: Mapping[str, Found], by: str) -> None:
    """Refuse names that no prompt can mean, such as COCO's "mouse" for GenEval's "computer mouse"."""
    known = {wanted["class"] for prompt in prompts for wanted in prompt.metadata["include"]} | {*OBJECT_NAMES, *SHAPES}
    for image, one in found.items():
        if unknown := sorted(one.detections.keys() - known):
            raise VarpiError(f"{by}: {image}: GenEval knows no class {unknown[0]!r}; use its names (object_names.txt)")


def _judge_prompt(root: Path, prompt: PromptFolder, found: Mapping[str, Found], by: str) -> dict[str, Any]:
    reasons: dict[str, str] = {}
    for path in prompt.images:
        name = path.relative_to(root).as_posix()
        if name not in found:
            raise VarpiError(f"{by}: there are no detections of {name}; every image needs an entry, if an empty one")
        try:
            correct, reason = judge_geneval(found[name].detections, prompt.metadata, found[name].colors)
        except VarpiError as error:
            raise VarpiError(f"{by}: {name}: {error}") from error
        if not correct:
            reasons[path.name] = reason
    images = len(prompt.images)
    return {
        "folder": prompt.name,
        "prompt": prompt.metadata["prompt"],
        "task": prompt.metadata["tag"],
        "images": images,
        "correct": images - len(reasons),
        "reasons": reasons,
    }


def _by_task(judged: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts by task, in the order of the paper's table, others after: prompts, those with a right image, images, …"""
    tasks = dict.fromkeys([task for task in GENEVAL_TASKS if any(one["task"] == task for one in judged)])
    tasks |= dict.fromkeys(one["task"] for one in judged)
    return {
        task: {
            "prompts": sum(one["task"] == task for one in judged),
            "prompts_with_a_correct_image": sum(one["task"] == task and one["correct"] > 0 for one in judged),
            "images": sum(one["images"] for one in judged if one["task"] == task),
            "correct": sum(one["correct"] for one in judged if one["task"] == task),
        }
        for task in tasks
    }


def _warnings(scores: Mapping[str, float], images: int, official: bool, detector: Detector | None) -> list[str]:
    warnings = []
    if missing := [task for task in GENEVAL_TASKS if task not in scores]:
        warnings.append(f"no prompts of the task {', '.join(missing)}: overall is the mean of {len(scores)} tasks")
    if images != IMAGES_PER_PROMPT:
        warnings.append(f"{images} images a prompt; GenEval's protocol has {IMAGES_PER_PROMPT}")
    if not official:
        warnings.append("the official metadata file was not given: prompts may be missing or changed")
    if detector is not None:
        warnings.append(
            f"detections by {detector.label}, not by GenEval's own detector (mmdet's Mask2Former): "
            "published scores are not to be compared with these"
        )
    return warnings


def sampling_settings(sampling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How `varpi sample` made a set, without what it made of what; None where it did not."""
    if sampling is None:
        return None
    return {key: value for key, value in sampling.items() if key not in ("classes", "prompts")}


def digest_of(lines: Iterable[str]) -> str:
    """The SHA-256 of lines of text, in hexadecimal."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
