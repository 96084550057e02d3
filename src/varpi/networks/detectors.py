"""Detectors of objects and colours for GenEval, and the files in which their detections are kept.

Ghosh et al. 2023 (arXiv 2310.11513) use mmdet's Mask2Former (Swin-S, COCO instances) and CLIP ViT-L/14. Here the
detector is transformers' Mask2Former of the same architecture, another checkpoint; the colours are by the same CLIP.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch.nn import functional

from varpi.data.images import decode
from varpi.data.prompts import GENEVAL_COLORS
from varpi.errors import VarpiError
from varpi.runtime.files import line, write_text
from varpi.runtime.tensors import few, fill, find, read_checkpoint, sha256_of

OBJECTS = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter "
    "bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee "
    "skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass "
    "cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch "
    "potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote computer_keyboard cell_phone microwave "
    "oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
)
OBJECT_NAMES = tuple(name.replace("_", " ") for name in OBJECTS.split())
"""GenEval's names of COCO's 80 classes, in COCO's order."""
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"
CLIP_L14 = "timm/vit_large_patch14_clip_224.openai:open_clip_model.safetensors"
"""OpenAI's ViT-L/14 as open_clip loads it."""
GREY = (0x99, 0x99, 0x99)
"""What takes the place of everything but the object before its colour is named."""
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")

Boxes = Mapping[str, Sequence[Sequence[float]]]
"""By class, [x1, y1, x2, y2, score] of each detection, in pixels from the upper left corner."""
Colors = Mapping[str, Sequence[str | None]]
"""By class, the colour of each detection, in the order of its boxes; None where nobody looked."""


class Found(NamedTuple):
    """What a detector saw in one image."""

    detections: Boxes
    colors: Colors


class Detector(Protocol):
    """Finds objects; `Mask2FormerDetector` is one."""

    label: str
    """What the scores by it are called."""
    source: str
    """Where its weights come from, for people."""
    identity: Mapping[str, Any]
    """What its detections depend on."""

    def __call__(self, image: Image.Image) -> tuple[dict[str, list[list[float]]], dict[str, np.ndarray]]:
        """Boxes and masks (bool, (n, H, W)) by class of an RGB image."""
        ...


class Colorist(Protocol):
    """Names colours; `ClipColorist` is one."""

    source: str
    identity: Mapping[str, Any]

    def __call__(self, image: Image.Image, name: str, boxes: Sequence[Sequence[float]], masks: np.ndarray) -> list[str]:
        """The colour of each detection of the class `name`, one of GENEVAL_COLORS."""
        ...


# -- detections


def read_detections(path: str | Path) -> dict[str, Found]:
    """Detections in a JSON file: {"00000/samples/0000.png": {"detections": Boxes, "colors": Colors}, …}.

    `colors` may be left out of images whose prompt asks for none. Paths may have more before these three parts.
    Raises VarpiError for a file that cannot be read or is not so.
    """
    path = Path(path).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VarpiError(f"{path}: cannot be read as a JSON file of detections ({error})") from error
    if not isinstance(content, dict):
        raise VarpiError(f"{path}: is a JSON {type(content).__name__}; expected an object with a key for each image")
    found = {"/".join(Path(name).parts[-3:]): _found(value, f"{path}: {name}") for name, value in content.items()}
    if len(found) != len(content):
        raise VarpiError(f"{path}: holds two images with the same last three parts; keep one set of samples in a file")
    return found


def write_detections(path: str | Path, found: Mapping[str, Found]) -> None:
    """Write detections in the form that `read_detections` reads."""
    write_text(path, json.dumps({name: one._asdict() for name, one in found.items()}) + "\n")


def _found(value: Any, where: str) -> Found:
    """Detections from JSON, checked."""
    if not isinstance(value, dict) or not isinstance(value.get("detections"), dict):
        raise VarpiError(f"{where}: has no detections; expected {{'detections': {{class: boxes}}, 'colors': …}}")
    detections, colors = value["detections"], value.get("colors", {})
    for name, boxes in detections.items():
        for box in boxes if isinstance(boxes, list) else [boxes]:
            if not isinstance(box, list) or len(box) != 5 or not all(_is_number(part) for part in box):
                raise VarpiError(f"{where}: {name!r} has the box {box!r}; expected [x1, y1, x2, y2, score]")
    for name, seen in colors.items() if isinstance(colors, dict) else [("", colors)]:
        if not isinstance(seen, list) or len(seen) != len(detections.get(name, [])):
            raise VarpiError(f"{where}: the colours of {name!r} are {seen!r}; expected one for each of its boxes")
        if unknown := [color for color in seen if color is not None and color not in GENEVAL_COLORS]:
            raise VarpiError(f"{where}: {unknown[0]!r} is none of GenEval's colours ({', '.join(GENEVAL_COLORS)})")
    return Found(detections, colors)


def _is_number(part: Any) -> bool:
    return isinstance(part, (int, float)) and math.isfinite(part)


def detect(
    root: Path,
    asked: Mapping[Path, set[str]],
    *,
    detector: Detector,
    colorist: Colorist | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Found]:
    """Look for objects in images, and for the colours of some classes.

    asked: the images, files below `root`, each with the classes whose colours are needed.
    cache: a JSON-lines file that takes each image's detections as they are made; what it holds already of an unchanged
        image is not made again, so an interrupted run goes on.
    progress: show a bar on stderr.

    Returns what was found by path, relative to `root`. Raises VarpiError when colours are needed and there is no
    colorist, and for a cache that is damaged or of another detector.
    """
    if colorist is None and any(asked.values()):
        raise VarpiError("some of the prompts ask for colours: give a colorist too")
    store = _Cache.open(cache, detector, colorist)
    found: dict[str, Found] = {}
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        for path, classes in bar.track(asked.items(), total=len(asked), description="detecting objects"):
            name, digest = path.relative_to(root).as_posix(), sha256_of(path)
            known = store.known.get((name, digest))
            if known is None or not classes <= known.colors.keys():
                known = _look(path, detector, colorist, classes)
                store.add(name, digest, known)
            found[name] = known
    return found


def _look(path: Path, detector: Detector, colorist: Colorist | None, asked: set[str]) -> Found:
    image = decode(path, str(path))
    boxes, masks = detector(image)
    colors: dict[str, list[str | None]] = {name: [] for name in sorted(asked)}
    for name in asked & boxes.keys():
        assert colorist is not None
        colors[name] = [*colorist(image, name, boxes[name], masks[name])]
    return Found(boxes, colors)


@dataclass
class _Cache:
    """Detections on disk, a line an image; the first line says whose they are."""

    known: dict[tuple[str, str], Found]
    """By path and SHA-256 of the image."""
    path: Path | None

    @classmethod
    def open(cls, path: str | Path | None, detector: Detector, colorist: Colorist | None) -> "_Cache":
        if path is None:
            return cls({}, None)
        path = Path(path).expanduser()
        # Through JSON and back, as what stands in the file has gone
        head = json.loads(json.dumps({"detector": detector.identity, "colorist": colorist and colorist.identity}))
        if not path.exists():
            write_text(path, json.dumps(head) + "\n")
            return cls({}, path)
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines[-1]:  # cut off in the middle of a line: it is made again
            write_text(path, "".join(f"{line}\n" for line in lines[:-1]))
        try:
            values = [json.loads(line) for line in lines[:-1]]
            known = {(v["image"], v["sha256"]): _found(v, f"{path}: {v['image']}") for v in values[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise VarpiError(f"{path}: is not a cache of detections, or damaged ({error}); remove it") from error
        if values[:1] != [head]:
            raise VarpiError(f"{path}: holds the detections of another detector or colorist; name another cache")
        return cls(known, path)

    def add(self, name: str, digest: str, found: Found) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"image": name, "sha256": digest, **found._asdict()}) + "\n")


# -- networks


class Mask2FormerDetector:
    """Transformers' Mask2Former as GenEval uses mmdet's: every query and class by itself, nothing suppressed.

    The score of a detection is its class probability times the mean probability within its mask; its box is that of
    its mask, right and lower edge exclusive.

    Args:
        source: a directory in transformers' layout or a Hub id; a Mask2Former for COCO's 80 classes.
        floor: scores up to this are left out; GenEval's rules look at none below 0.3.
        size: pixels to which the shorter side is brought, and the most of the longer, whatever the checkpoint's own
            processor says; the default is that of mmdet's test pipeline.

    Raises:
        VarpiError: nothing is there, it is another model or lacks weights, or a package is missing.
    """

    label = "HF Mask2Former"

    def __init__(
        self,
        source: str | Path = MASK2FORMER,
        *,
        device: torch.device | str = "cpu",
        floor: float = 0.1,
        size: tuple[int, int] = (800, 1333),
    ):
        model, folder, digest = load_transformers("Mask2FormerForUniversalSegmentation", source, "GenEval's detector")
        from transformers import Mask2FormerImageProcessor

        try:
            self._processor = Mask2FormerImageProcessor.from_pretrained(
                folder, size=dict(zip(("shortest_edge", "longest_edge"), size, strict=True)), local_files_only=True
            )
        except Exception as error:  # which exception a damaged file raises depends on what is damaged
            raise VarpiError(f"{source}: its preprocessor_config.json cannot be read ({line(error)})") from error
        _check_labels(model.config.id2label, str(source))
        self.source, self.device, self.floor = str(source), torch.device(device), floor
        self._model = model.to(self.device)
        self.identity: Mapping[str, Any] = {
            "model": "mask2former",
            "sha256": digest,
            "size": list(size),
            "floor": floor,
        }

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> tuple[dict[str, list[list[float]]], dict[str, np.ndarray]]:
        """Boxes [x1, y1, x2, y2, score] and masks, bool (n, H, W), by GenEval's class names, of an RGB image."""
        inputs = self._processor(images=image, return_tensors="pt").to(self.device)
        outputs = self._model(**inputs)
        probabilities = outputs.class_queries_logits[0].softmax(dim=-1)[:, :-1]  # the last is "no object"
        best, indices = probabilities.flatten().topk(len(probabilities))
        best, indices = best[best > self.floor], indices[best > self.floor]
        boxes: dict[str, list[list[float]]] = {}
        masks: dict[str, list[np.ndarray]] = {}
        if len(indices):
            logits = outputs.masks_queries_logits[:, indices // len(OBJECT_NAMES)]
            # As in mmdet: first to the size that the network saw, then to that of the image
            for size in (inputs["pixel_values"].shape[-2:], (image.height, image.width)):
                logits = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            inside = logits[0] > 0
            sizes = inside.sum(dim=(1, 2))
            scores = best * (logits[0].sigmoid() * inside).sum(dim=(1, 2)) / (sizes + 1e-6)
            for i in ((scores > self.floor) & (sizes > 0)).nonzero()[:, 0].tolist():
                name, mask = OBJECT_NAMES[int(indices[i]) % len(OBJECT_NAMES)], inside[i].cpu().numpy()
                boxes.setdefault(name, []).append([*_box_of(mask), float(scores[i])])
                masks.setdefault(name, []).append(mask)
        return boxes, {name: np.stack(several) for name, several in masks.items()}


def _check_labels(labels: Mapping[int, str], where: str) -> None:
    """Refuse a model of other classes than COCO's 80, or in another order; their spelling is nobody's concern."""
    if len(labels) != len(OBJECT_NAMES):
        raise VarpiError(
            f"{where}: knows {len(labels)} classes; GenEval's detector must know COCO's {len(OBJECT_NAMES)}"
        )
    places = {name.replace(" ", ""): i for i, name in enumerate(OBJECT_NAMES)}
    for i, label in labels.items():
        if places.get("".join(c for c in label.lower() if c.isalpha()), i) != i:
            raise VarpiError(f"{where}: its class {i} is {label!r}, COCO's is {OBJECT_NAMES[i]!r}; the order differs")


def _box_of(mask: np.ndarray) -> list[float]:
    """Left, upper, right and lower edge of a mask (H, W) that is not empty."""
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


class ClipColorist:
    """Names colours by CLIP's zero-shot choice among ten, as GenEval does, in float32 (there: under autocast).

    Args:
        source: weights of open_clip's layout: a file or a Hub id.
        architecture: a name or configuration of open_clip; OpenAI's models need the "-quickgelu" ones.

    Raises:
        VarpiError: nothing is there, it does not fit the architecture, or a package is missing.
    """

    def __init__(
        self,
        source: str | Path = CLIP_L14,
        *,
        device: torch.device | str = "cpu",
        architecture: str | Mapping[str, Any] = "ViT-L-14-quickgelu",
    ):
        self._model, digest = load_open_clip(architecture, source, "GenEval's colours")
        import open_clip

        self.source, self.device = str(source), torch.device(device)
        self._model.to(self.device)
        self._tokenizer = open_clip.SimpleTokenizer(context_length=self._model.context_length)
        self._transform: Any = open_clip.image_transform(self._model.visual.image_size, is_train=False)
        self._embeddings: dict[str, torch.Tensor] = {}
        self.identity: Mapping[str, Any] = {"model": architecture_name(architecture), "sha256": digest}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, name: str, boxes: Sequence[Sequence[float]], masks: np.ndarray) -> list[str]:
        """The colour of each detection of the class `name`, one of GENEVAL_COLORS. masks: bool (n, H, W)."""
        colors: list[str] = []
        crops = [crop_object(image, box, mask) for box, mask in zip(boxes, masks, strict=True)]
        for start in range(0, len(crops), 16):
            pixels = torch.stack([self._transform(crop) for crop in crops[start : start + 16]]).to(self.device)
            features = self._model.encode_image(pixels, normalize=True)
            colors += [GENEVAL_COLORS[i] for i in (features @ self._text(name).T).argmax(dim=1).tolist()]
        return colors

    def _text(self, name: str) -> torch.Tensor:
        """A unit vector for each colour, the mean of its sentences': (10, D)."""
        if name not in self._embeddings:
            texts = [template.format(color=color, name=name) for color in GENEVAL_COLORS for template in TEMPLATES]
            features = self._model.encode_text(self._tokenizer(texts).to(self.device), normalize=True)
            means = features.unflatten(0, (len(GENEVAL_COLORS), len(TEMPLATES))).mean(dim=1)
            self._embeddings[name] = functional.normalize(means, dim=-1)
        return self._embeddings[name]


def crop_object(image: Image.Image, box: Sequence[float], mask: np.ndarray) -> Image.Image:
    """An object alone: what is outside its mask (bool (H, W)) becomes grey, then its box is cut out."""
    alone = Image.composite(image, Image.new("RGB", image.size, GREY), Image.fromarray(mask))
    left, upper, right, lower = (round(edge) for edge in box[:4])
    return alone.crop((left, upper, right, lower))


def load_transformers(name: str, source: str | Path, what: str) -> tuple[Any, Path, str]:
    """A model of transformers' class `name`, frozen, float32; its directory; the SHA-256 of its weights.

    source: a directory in transformers' layout, or a Hub id. what: what it is for, in the message.
    Raises VarpiError when it is not there, is of another class or lacks weights, or a package is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise VarpiError(f"{what} needs transformers: pip install 'varpi[evaluation,text]'") from error
    kind = getattr(transformers, name)
    weights = find_weights(source, what)
    folder, expected = weights.parent, kind.config_class.model_type
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise VarpiError(f"{what}: {source}: its config.json cannot be read ({line(error)})") from error
    if found != expected:
        raise VarpiError(f"{what}: {source}: is a model of type {found!r}; expected {expected!r}")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except ImportError as error:
        raise VarpiError(
            f"{what} needs another package: pip install 'varpi[evaluation,text]' ({line(error)})"
        ) from error
    except Exception as error:  # which exception a damaged file raises depends on its format
        raise VarpiError(f"{what}: {source}: its weights cannot be loaded ({line(error)})") from error
    missing = sorted(set(report["missing_keys"]) & dict(model.named_parameters()).keys())
    if missing:  # transformers draws these at random
        raise VarpiError(f"{what}: {source}: {len(missing)} weights are missing ({few(missing, 3)})")
    return model.eval().requires_grad_(False), folder, sha256_of(weights)


def load_open_clip(architecture: str | Mapping[str, Any], source: str | Path, what: str) -> tuple[Any, str]:
    """A CLIP of open_clip, frozen, float32, with the weights of a file, and their SHA-256.

    architecture: a name that open_clip knows, or such a configuration (embed_dim, vision_cfg, text_cfg).
    source, what: as for `load_transformers`. Raises VarpiError when the weights are not there or do not fit exactly.
    """
    try:
        import open_clip
    except ImportError as error:
        raise VarpiError(f"{what} needs {error.name}: pip install 'varpi[evaluation]'") from error
    config = open_clip.get_model_config(architecture) if isinstance(architecture, str) else dict(architecture)
    if config is None:
        raise VarpiError(f"{what}: open_clip knows no architecture {architecture!r}")
    weights = find_weights(source, what)
    tensors = read_checkpoint(weights).tensors
    model = open_clip.CLIP(**config)
    fill(model, tensors, str, f"{what}: {weights}", architecture_name(architecture), "cpu", torch.float32)
    return model.eval().requires_grad_(False), sha256_of(weights)


def architecture_name(architecture: str | Mapping[str, Any]) -> str:
    """What to call an architecture of open_clip in messages and results."""
    return architecture if isinstance(architecture, str) else "a configuration of open_clip"


def find_weights(source: str | Path, what: str) -> Path:
    """The weights file that `source` means, downloaded if need be; the message of a failure says what it is for."""
    try:
        return find(source)
    except VarpiError as error:
        raise VarpiError(f"{what}: {error}") from error
