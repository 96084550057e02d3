"""The pretrained pair that a method trains with, loaded and checked against the data."""

import importlib.resources
from typing import Any

import torch
from torch import nn

from varpi.errors import VarpiError
from varpi.generators import Generator, LlamaGen, LlamaGenConfig
from varpi.recipe import Recipe, TokenizerSection
from varpi.tokenizers import VQ, Tokenizer, VQConfig
from varpi.weights import check_pair, load_generator, load_tokenizer
from varpi.weights.lora import add_adapters


def load_pair(recipe: Recipe, num_classes: int | None, device: str) -> tuple[Generator, Tokenizer]:
    """The recipe's generator, trainable, and its tokenizer, frozen.

    num_classes: of the data; None for captions. Raises VarpiError when they do not fit each other, the image size or
    the data.
    """
    assert recipe.generator is not None
    assert recipe.tokenizer is not None
    tokenizer: Any = open_tokenizer(recipe.tokenizer, device)
    tokenizer.requires_grad_(False).eval()
    size = recipe.data.image_size
    generator = open_generator(recipe, device)
    check_pair(generator, tokenizer)
    if generator.grid * tokenizer.downsample != size:
        raise VarpiError(
            f"data.image_size is {size}, but a {generator.grid}x{generator.grid} grid of tokens decodes to "
            f"{generator.grid * tokenizer.downsample} pixels with this tokenizer (down-sampling {tokenizer.downsample})"
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
    return generator, tokenizer


def open_generator(recipe: Recipe, device: str) -> Any:
    """The generator that the recipe begins with, as it is before any training."""
    section = recipe.generator
    assert section is not None
    architecture = _config(section.architecture, LlamaGenConfig, "generator")
    if section.source is None:
        if not isinstance(architecture, LlamaGenConfig):
            raise VarpiError("generator.architecture must list the fields of LlamaGenConfig to start afresh")
        generator: Any = LlamaGen(architecture).to(device)
    else:
        frozen_in_bf16 = recipe.lora is not None and recipe.training.precision == "bf16"
        generator = load_generator(
            section.source,
            architecture=architecture,
            image_size=recipe.data.image_size,
            device=device,
            dtype=torch.bfloat16 if frozen_in_bf16 else torch.float32,
            compat=section.compat,
        )
    if section.dropout is not None:
        for module in generator.modules():
            if isinstance(module, nn.Dropout):
                module.p = section.dropout
    if section.text_encoder is not None:
        give_text_encoder(generator, section.text_encoder, device)
    return generator


def give_text_encoder(generator: Any, source: str, device: str) -> None:
    """Let a generator that reads caption features encode captions itself. source: T5 directory, Hub id or `digits`."""
    from varpi.data.text_encoder import TextEncoder

    if source == "digits":
        source = str(importlib.resources.files("varpi.embedded") / "digits-text")
    if not (isinstance(generator, LlamaGen) and generator.config.conditioning == "text"):
        raise VarpiError("a text encoder is for text-conditional LlamaGen; this generator has no use for one")
    config = generator.config
    assert config.condition_tokens is not None
    encoder = TextEncoder(source, max_tokens=config.condition_tokens, device=device)
    if encoder.width != config.caption_dim:
        raise VarpiError(
            f"{source}: its features have width {encoder.width}, but the generator reads {config.caption_dim}; it was "
            "trained with another text encoder"
        )
    generator.text_encoder = encoder


def open_tokenizer(section: TokenizerSection, device: str) -> Any:
    architecture = _config(section.architecture, VQConfig, "tokenizer")
    if section.source is None:
        if not isinstance(architecture, VQConfig):
            raise VarpiError("tokenizer.architecture must list the fields of VQConfig to start afresh")
        return VQ(architecture).to(device)
    return load_tokenizer(section.source, architecture=architecture, device=device)


def _config(architecture: str | dict[str, Any] | None, kind: type, where: str) -> Any:
    if not isinstance(architecture, dict):
        return architecture
    try:
        return kind(**architecture)
    except TypeError as error:
        raise VarpiError(f"{where}.architecture: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from error
