"""CLIP, in two uses: how well an image fits its prompt, and which colour an object has.

The first is AR-GRPO's, on transformers' CLIP; the second GenEval's (Ghosh et al. 2023, arXiv 2310.11513), on that of
open_clip. Both compute in float32 on every device. Shapes: B images of H x W pixels, n detections.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from varpi.data.prompts import GENEVAL_COLORS
from varpi.errors import VarpiError
from varpi.networks.foreign import ClipArchitecture, architecture_name, load_open_clip, load_transformers
from varpi.runtime.files import line

CLIP_B32 = "openai/clip-vit-base-patch32"
CLIP_L14 = "timm/vit_large_patch14_clip_224.openai:open_clip_model.safetensors"
"""OpenAI's ViT-L/14 as open_clip loads it."""
GREY = (0x99, 0x99, 0x99)
"""What takes the place of everything but the object before its colour is named."""
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ClipScorer:
    """The cosine of transformers' CLIP, images as its processor prepares them, prompts cut to what it can read.

    source: a directory in transformers' layout or a Hub id. AR-GRPO's code takes openai/clip-vit-base-patch32.
    Raises VarpiError when nothing is there, it is no CLIP or incomplete, or a package is missing.
    """

    name = "clip_score"

    def __init__(self, source: str | Path = CLIP_B32, *, device: torch.device | str = "cpu") -> None:
        model, folder, digest = load_transformers("CLIPModel", source, "the CLIP score")
        from transformers import CLIPProcessor

        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            # transformers would make an empty tokenizer up
            raise VarpiError(f"{source}: holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
        try:
            self._processor: Any = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # which exception a damaged file raises depends on what is damaged
            raise VarpiError(f"{source}: its processor and tokenizer cannot be loaded ({line(error)})") from error
        self.source, self.device = str(source), torch.device(device)
        self.identity = {"model": "clip", "sha256": digest}  # what the scores depend on
        self._model = model.to(self.device)
        self._length = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores float32 (B,), on the CPU, of images uint8 (B,3,H,W) with their prompts."""
        inputs = self._processor(
            text=list(prompts),
            images=list(images),
            padding=True,
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        ).to(self.device)
        outputs = self._model(**inputs)  # embeddings of length 1
        return (outputs.image_embeds * outputs.text_embeds).sum(dim=-1).float().cpu()


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
        architecture: ClipArchitecture = "ViT-L-14-quickgelu",
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
