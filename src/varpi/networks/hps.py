"""The human preference score v2 (Wu et al. 2023, arXiv 2306.09341): how well people would like an image for its prompt.

The original computes under autocast, in half precision; here it is float32. Shapes: B images of H x W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from varpi.errors import VarpiError
from varpi.networks.foreign import ClipArchitecture, architecture_name, load_open_clip

HPS_REPOSITORY = "xswu/HPSv2"
HPS_FILES = {"v2.1": "HPS_v2.1_compressed.pt", "v2.0": "HPS_v2_compressed.pt"}


class HpsScorer:
    """The human preference score v2 (Wu et al. 2023, arXiv 2306.09341): the cosine of a ViT-H/14 of open_clip.

    Images are brought to the network's size by their longer side and padded with black, as in the original.

    weights: the checkpoint, a file or Hub id; by default xswu/HPSv2's of `version`, "v2.1" or "v2.0".
    architecture: a name or configuration of open_clip.
    Raises VarpiError for another version, a checkpoint that is not there or does not fit, or a missing package.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        version: str = "v2.1",
        device: torch.device | str = "cpu",
        architecture: ClipArchitecture = "ViT-H-14",
    ) -> None:
        if version not in HPS_FILES:
            raise VarpiError(f"there is no HPS {version!r}; there are {', '.join(HPS_FILES)}")
        file = HPS_FILES[version]
        source = f"{HPS_REPOSITORY}:{file}" if weights is None else str(weights)
        others = [other for other, name in HPS_FILES.items() if name == source.rpartition(":")[2].rpartition("/")[2]]
        if others and version not in others:
            raise VarpiError(f"{source}: is HPS {others[0]}'s file by its name, and {version} was asked for")
        what = f"HPS {version}, file {file} of huggingface.co/{HPS_REPOSITORY}"
        self._model, digest = load_open_clip(architecture, source, what)
        import open_clip

        self.name, self.source, self.device = f"hps_{version}", source, torch.device(device)
        self.identity = {"model": architecture_name(architecture), "sha256": digest}
        self._model.to(self.device)
        self._tokenizer = open_clip.SimpleTokenizer(context_length=self._model.context_length)
        self._mean, self._deviation = list(open_clip.OPENAI_DATASET_MEAN), list(open_clip.OPENAI_DATASET_STD)

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores float32 (B,), on the CPU, of images uint8 (B,3,H,W) with their prompts."""
        pixels = fit_longer_side(images.to(self.device).float() / 255, max(self._model.visual.image_size))
        from torchvision.transforms import functional as transforms  # two seconds that only this needs

        pixels = transforms.normalize(pixels, self._mean, self._deviation)
        image_features = self._model.encode_image(pixels, normalize=True)
        text_features = self._model.encode_text(self._tokenizer(list(prompts)).to(self.device), normalize=True)
        return (image_features * text_features).sum(dim=-1).cpu()


def fit_longer_side(images: Tensor, size: int) -> Tensor:
    """Resize images (B,3,H,W) so that their longer side is `size`, bicubic; pad the other with 0 on both sides."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    height, width = images.shape[-2:]
    if max(height, width) == size:
        new = [height, width]
    else:
        new = [round(side * size / max(height, width)) for side in (height, width)]
        images = transforms.resize(images, new, InterpolationMode.BICUBIC, antialias=True)
    down, right = size - new[0], size - new[1]
    return transforms.pad(images, [right // 2, down // 2, right - right // 2, down - down // 2])
