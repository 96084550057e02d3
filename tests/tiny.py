"""A pair small enough to train within a test, its images and its recipes. The tests and the soak run share them."""

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from PIL import Image
from torch import nn

from varpi.data.classes import wordnet_ids
from varpi.generators import LlamaGen, LlamaGenConfig
from varpi.recipe import Recipe, load_recipe
from varpi.tokenizers import VQ, VQConfig
from varpi.weights import save_generator, save_tokenizer

IMAGE_SIZE = 16
GENERATOR = LlamaGenConfig(dim=32, n_layer=2, n_head=2, vocab_size=32, grid=4, num_classes=3, ffn_dim=64)
TOKENIZER = VQConfig(
    downsample=4,
    channels=8,
    channel_multipliers=(1, 1, 1),
    latent_channels=8,
    codebook_size=32,
    codebook_dim=4,
    norm_groups=4,
    encoder_blocks=1,
    decoder_blocks=1,
)
TIMES = ("seconds", "tokens_per_second", "peak_memory")
"""What the names of metrics that differ from run to run begin with."""


def generator(config: LlamaGenConfig = GENERATOR, seed: int = 1) -> LlamaGen:
    """Random, with an output layer that is not zero as a fresh one is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaGen(config)
        nn.init.normal_(model.output.weight, std=0.3)
    return model.eval()


def tokenizer(config: VQConfig = TOKENIZER, seed: int = 2) -> VQ:
    """Random, with codes that lie in all directions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VQ(config)
        nn.init.normal_(model.quantize.embedding.weight)
    return model.eval()


def images(folder: Path, classes: str = "abc", per_class: int = 8, seed: int = 3) -> Path:
    """A tree of class folders with PNGs of a few random blocks of color."""
    draws = torch.Generator().manual_seed(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            blocks = torch.randint(256, (4, 4, 3), generator=draws, dtype=torch.uint8)
            Image.fromarray(blocks.numpy()).resize((IMAGE_SIZE, IMAGE_SIZE), 0).save(folder / name / f"{i}.png")
    return folder


def photographs(folder: Path, sizes: Sequence[tuple[int, int]], seed: int = 6) -> Path:
    """A tree in ImageNet's layout: folders of its first classes, with one JPEG each, of these (width, height)."""
    draws = torch.Generator().manual_seed(seed)
    for name, size in zip(wordnet_ids(), sizes, strict=False):
        (folder / name).mkdir(parents=True)
        blocks = torch.randint(256, (6, 8, 3), generator=draws, dtype=torch.uint8)
        photograph = Image.fromarray(blocks.numpy()).resize(size, Image.Resampling.BICUBIC)
        photograph.save(folder / name / f"{name}_0.JPEG", quality=90)
    return folder


def make(folder: Path) -> Path:
    """Fill `folder` with the pair (*.safetensors), images/{train,val} and a recipe for each method."""
    save_generator(generator(), folder / "generator.safetensors")
    save_tokenizer(tokenizer(), folder / "tokenizer.safetensors")
    images(folder / "images" / "train")
    images(folder / "images" / "val", per_class=2, seed=4)
    common = {
        "generator": {"source": str(folder / "generator.safetensors")},
        "tokenizer": {"source": str(folder / "tokenizer.safetensors")},
        "data": {"source": str(folder / "images"), "image_size": IMAGE_SIZE},
        "optimizer": {"learning_rate": 3e-3},
        "training": {"steps": 6, "batch_size": 8},
        "seed": 5,
    }
    va_pi = {"name": "va_pi", "group_size": 4, "context_noise": 0.2, "reward": {"perceptual_weight": 0}}
    ste = {"name": "ste", "reward": {"perceptual_weight": 0}}
    decoder = {"name": "tokenizer_decoder", "reward": {"perceptual_weight": 0}}
    grpo = {"name": "ar_grpo", "group_size": 4, "rewards": {"function": {"path": "tiny:brightness"}}}
    plain = {name: {"name": name} for name in ("next_token", "cca", "gft", "guided")}
    for name, method in {"va_pi": va_pi, "ste": ste, "tokenizer_decoder": decoder, "ar_grpo": grpo, **plain}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"method": method, **common}))
    return folder


def brightness(images: torch.Tensor, asked: torch.Tensor | list[str]) -> torch.Tensor:
    """A reward: the mean of images uint8 (B,3,H,W), in [0,1]."""
    return images.float().mean(dim=(1, 2, 3)) / 255


def recipe(folder: Path, *settings: str, method: str = "va_pi") -> Recipe:
    """The recipe in `folder`, with `key=value` settings."""
    return load_recipe(folder / f"{method}.yaml", list(settings))
