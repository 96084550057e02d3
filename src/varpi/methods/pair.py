"""The pretrained pair that a method trains with, loaded and checked against the data."""

from typing import Any

import torch
from torch import nn

from varpi.data import Dataset
from varpi.errors import VarpiError
from varpi.generators import Generator, LlamaGen, LlamaGenConfig
from varpi.recipe import GeneratorSection, Recipe, TokenizerSection
from varpi.tokenizers import VQ, Tokenizer, VQConfig
from varpi.weights import check_pair, load_generator, load_tokenizer


def load_pair(recipe: Recipe, dataset: Dataset, device: str) -> tuple[Generator, Tokenizer]:
    """The recipe's generator, trainable, and its tokenizer, frozen.

    Raises VarpiError when they do not fit each other, the image size or the data's classes.
    """
    assert recipe.generator is not None
    assert recipe.tokenizer is not None
    tokenizer = open_tokenizer(recipe.tokenizer, device)
    tokenizer.requires_grad_(False).eval()
    size = recipe.data.image_size
    generator = open_generator(recipe.generator, size, device)
    check_pair(generator, tokenizer)
    if generator.grid * tokenizer.downsample != size:
        raise VarpiError(
            f"data.image_size is {size}, but a {generator.grid}x{generator.grid} grid of tokens decodes to "
            f"{generator.grid * tokenizer.downsample} pixels with this tokenizer (down-sampling {tokenizer.downsample})"
        )
    if dataset.num_classes is not None and dataset.num_classes > generator.config.num_classes:
        raise VarpiError(
            f"data.source has {dataset.num_classes} classes, but the generator knows {generator.config.num_classes}"
        )
    generator.prepare_condition([0])  # refuses a generator that is conditioned on something else than classes
    generator.gradient_checkpointing = recipe.training.gradient_checkpointing
    return generator, tokenizer


def open_generator(section: GeneratorSection, image_size: int, device: str) -> Any:
    architecture = _config(section.architecture, LlamaGenConfig, "generator")
    if section.source is None:
        if not isinstance(architecture, LlamaGenConfig):
            raise VarpiError("generator.architecture must list the fields of LlamaGenConfig to start afresh")
        generator: Any = LlamaGen(architecture).to(device)
    else:
        generator = load_generator(section.source, architecture=architecture, image_size=image_size, device=device)
    if section.dropout is not None:
        for module in generator.modules():
            if isinstance(module, nn.Dropout):
                module.p = section.dropout
    return generator


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


def autocast(device: str | torch.device, precision: str) -> torch.autocast:
    """bf16 autocast when the recipe asks for it."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
