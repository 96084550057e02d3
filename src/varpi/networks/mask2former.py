"""Mask2Former, which finds COCO's objects in images, as GenEval uses it (Ghosh et al. 2023, arXiv 2310.11513).

GenEval's is mmdet's Mask2Former (Swin-S, COCO instances); here it is transformers' of the same architecture, another
checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from varpi.errors import VarpiError
from varpi.networks.foreign import load_transformers
from varpi.runtime.files import line

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
