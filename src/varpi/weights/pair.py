"""The pair of a generator and its tokenizer: opened in one place, checked against each other and against the data."""

import importlib.resources
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from varpi.errors import VarpiError
from varpi.generators import Generator
from varpi.recipe import Recipe, TokenizerSection, parse_recipe, read_yaml
from varpi.runtime.sources import EMBEDDED, Source
from varpi.tokenizers import Tokenizer
from varpi.weights.load import Architecture, fresh, load_generator, load_tokenizer
from varpi.weights.lora import add_adapters

RUN_MODEL = "model.safetensors"
"""What a run calls its weights."""


@dataclass(frozen=True)
class Pair:
    """A generator and the tokenizer whose codes it speaks. Raises VarpiError for two that do not fit."""

    generator: Generator
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        check_pair(self.generator, self.tokenizer)

    @property
    def image_size(self) -> int:
        """Pixels per side of its images."""
        return self.generator.grid * self.tokenizer.downsample

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of its classes by id, as far as they are known."""
        return self.generator.class_names


def check_pair(generator: Generator, tokenizer: Tokenizer) -> None:
    """Refuse a generator and a tokenizer that do not speak of the same codes."""
    if generator.vocab_size != tokenizer.codebook_size:
        raise VarpiError(
            f"generator and tokenizer do not belong together: the generator's vocabulary has {generator.vocab_size} "
            f"tokens, the tokenizer's codebook {tokenizer.codebook_size}"
        )


# -- to generate with


def open_pair(
    source: Source,
    *,
    tokenizer: Source | None = None,
    architecture: Architecture = None,
    tokenizer_architecture: Architecture = None,
    image_size: int | None = None,
    text_encoder: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> Pair:
    """A pair in eval mode. source, architecture, image_size, device and dtype are those of `load_generator`.

    tokenizer: by default the one that belongs to the source: of an embedded pair or a transformers model its own, of a
        run the one in its recipe. A run that trained a tokenizer for a generator is that pair.
    text_encoder: T5 directory or Hub id, for a generator that reads caption features; by default the run's, or that of
        the embedded pair.

    Raises VarpiError when a part cannot be read or the parts do not fit each other.
    """
    recipe = None if isinstance(source, Mapping) else recipe_of(source)
    if recipe is not None and recipe.generator is not None and recipe.method.trains == "tokenizer":
        assert recipe.generator.source is not None
        tokenizer = source if tokenizer is None else tokenizer
        source, architecture = recipe.generator.source, architecture or recipe.generator.architecture
        image_size = image_size or recipe.data.image_size
    generator = load_generator(
        source,
        architecture=architecture,
        image_size=image_size,
        device=device,
        dtype=dtype,
        compat=recipe.generator.compat if recipe is not None and recipe.generator is not None else None,
    )
    if tokenizer is None and tokenizer_architecture is None:
        if (isinstance(source, str) and source in EMBEDDED) or generator.hf_config is not None:
            tokenizer, tokenizer_architecture = source, architecture
        elif recipe is not None and recipe.tokenizer is not None:
            tokenizer, tokenizer_architecture = recipe.tokenizer.source, recipe.tokenizer.architecture
    if tokenizer is None:
        raise VarpiError("the tokenizer is missing (--tokenizer): a checkpoint, a Hub id, or `digits`")
    pair = Pair(generator, load_tokenizer(tokenizer, architecture=tokenizer_architecture, device=device, dtype=dtype))
    if image_size not in (None, pair.image_size):
        raise VarpiError(f"image_size is {image_size}, but this pair makes images of {pair.image_size} pixels")
    if text_encoder is None and recipe is not None and recipe.generator is not None:
        text_encoder = recipe.generator.text_encoder
    if text_encoder is None and source == "shapes":
        text_encoder = "shapes"
    if text_encoder is not None:
        give_text_encoder(generator, text_encoder, device)
    return pair


def recipe_of(source: str | os.PathLike[str]) -> Recipe | None:
    """The recipe of a run, given as its directory or its model's file; None for anything else."""
    path = Path(source)
    path = (path.parent if path.name == RUN_MODEL else path) / "recipe.yaml"
    return parse_recipe(read_yaml(path), str(path)) if os.path.isfile(path) else None


def give_text_encoder(generator: Generator, source: str, device: torch.device | str) -> None:
    """Let a generator that reads caption features encode captions itself. source: T5 directory, Hub id, `digits` or
    `shapes`."""
    from varpi.data.text_encoder import TextEncoder

    if source in ("digits", "shapes"):
        source = str(importlib.resources.files("varpi.embedded") / f"{source}-text")
    if generator.caption_features is None:
        raise VarpiError("a text encoder is for generators that read caption features; this one has no use for it")
    tokens, width = generator.caption_features
    encoder = TextEncoder(source, max_tokens=tokens, device=str(device))
    if encoder.width != width:
        raise VarpiError(
            f"{source}: its features have width {encoder.width}, but the generator reads {width}; it was trained with "
            "another text encoder"
        )
    generator.text_encoder = encoder


# -- to train


def load_pair(recipe: Recipe, num_classes: int | None, device: str) -> Pair:
    """The recipe's generator, trainable, and its tokenizer, frozen.

    num_classes: of the data; None for captions. Raises VarpiError when they do not fit each other, the image size or
    the data.
    """
    assert recipe.tokenizer is not None
    tokenizer = open_tokenizer(recipe.tokenizer, device)
    tokenizer.requires_grad_(False).eval()
    generator = open_generator(recipe, device)
    pair = Pair(generator, tokenizer)
    if pair.image_size != recipe.data.image_size:
        raise VarpiError(
            f"data.image_size is {recipe.data.image_size}, but a {generator.grid}x{generator.grid} grid of tokens "
            f"decodes to {pair.image_size} pixels with this tokenizer (down-sampling {tokenizer.downsample})"
        )
    if generator.num_classes is None and num_classes is not None:
        raise VarpiError(
            "the generator is conditioned on text, but data.source gives classes; set data.caption_column, or choose a "
            "captioned source (tar shards, jsonl files)"
        )
    if generator.num_classes is not None and (num_classes is None or num_classes > generator.num_classes):
        found = "captions" if num_classes is None else f"{num_classes} classes"
        raise VarpiError(f"data.source has {found}, but the generator knows {generator.num_classes} classes")
    if recipe.lora is not None:
        lora = recipe.lora
        add_adapters(generator, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets)
    generator.gradient_checkpointing = recipe.training.gradient_checkpointing
    return pair


def open_generator(recipe: Recipe, device: str, *, reads_captions: bool = True) -> Generator:
    """The generator that the recipe begins with, as it is before any training.

    reads_captions: with the recipe's text encoder, where it names one.
    """
    section = recipe.generator
    assert section is not None
    if section.source is None:
        generator = fresh("generator", section.architecture, "generator.architecture").to(device)
        assert isinstance(generator, Generator)
    else:
        frozen_in_bf16 = recipe.lora is not None and recipe.training.precision == "bf16"
        generator = load_generator(
            section.source,
            architecture=section.architecture,
            image_size=recipe.data.image_size,
            device=device,
            dtype=torch.bfloat16 if frozen_in_bf16 else torch.float32,
            compat=section.compat,
        )
    if section.dropout is not None:
        if section.dropout > 0 and not any(isinstance(module, nn.Dropout) for module in generator.blocks.modules()):
            raise VarpiError(
                f"generator.dropout is {section.dropout}, but a {type(generator).__name__} has none to set"
            )
        for module in generator.modules():
            if isinstance(module, nn.Dropout):
                module.p = section.dropout
    if section.text_encoder is not None and reads_captions:
        give_text_encoder(generator, section.text_encoder, device)
    return generator


def open_tokenizer(section: TokenizerSection, device: str) -> Tokenizer:
    """The tokenizer that a recipe begins with."""
    if section.source is None:
        tokenizer = fresh("tokenizer", section.architecture, "tokenizer.architecture").to(device)
        assert isinstance(tokenizer, Tokenizer)
        return tokenizer
    return load_tokenizer(section.source, architecture=section.architecture, device=device)
