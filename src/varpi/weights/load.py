"""Weights in: LlamaGen's files, transformers' or ours, strictly.

A checkpoint is read whole or refused: every tensor that the model needs must be there, with its shape, finite, and
nothing may be left over. What refuses says which tensors, and which side expected what.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varpi.errors import VarpiError
from varpi.generators import Generator
from varpi.runtime.memory import check_memory
from varpi.runtime.pretrained import Pretrained, Stored, config_of
from varpi.runtime.sizes import sizes_only, without_numbers
from varpi.runtime.sources import EMBEDDED, Source, embedded, is_here
from varpi.runtime.tensors import fill, read_checkpoint
from varpi.tokenizers import Tokenizer
from varpi.weights.class_names import read_class_names
from varpi.weights.families import Part, family_of, family_of_fields, shape_of

FORMAT = 1
"""Version of the description inside our own files."""
DOWNSAMPLES = (4, 8, 16)
Architecture = Any
"""A name ("llamagen-c2i-xxl", "vq-16"), a mapping of a configuration's fields, or a configuration (LlamaGenConfig)."""


def load_generator(
    source: Source,
    *,
    architecture: Architecture = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    compat: Mapping[str, bool] | None = None,
) -> Generator:
    """A generator with the weights of a checkpoint, in eval mode.

    source: a file (.pt, .pth, .safetensors), a directory, a Hub id "org/name[@revision][:file]", a state dict, or the
        name of an embedded pair ("digits").
    architecture: a name ("llamagen-c2i-xxl", "janus-pro-1b"), a `LlamaGenConfig` or a mapping of its fields. By default
        what the file, or the config.json beside it, says of itself, or else what its tensors imply.
    image_size: pixels per side; needed for LlamaGen's own files, which do not tell the grid. With a 16-fold tokenizer
        the grid is image_size / 16; for another tokenizer pass a `LlamaGenConfig`.
    dtype: a floating-point dtype, or its name ("bfloat16").
    compat: where to follow released code against the model itself; each family of generators knows its own switches.

    Raises:
        VarpiError: the source cannot be read, its tensors contradict the architecture, or they are not complete.
    """
    if sizes_only() and not is_here(source):
        named = _by_name(source, "generator", architecture, image_size, device, dtype)
        assert isinstance(named, Generator)
        return named
    opened = _open(source, "generator")
    generator = _load(opened, "generator", architecture, image_size, device, dtype, compat or {})
    assert isinstance(generator, Generator)
    generator.class_names = read_class_names(opened.metadata, opened.where)
    if generator.class_names is not None and len(generator.class_names) > (generator.num_classes or 0):
        raise VarpiError(
            f"{opened.where}: names {len(generator.class_names)} classes, but its generator knows "
            f"{generator.num_classes or 'none'}"
        )
    return generator


def load_tokenizer(
    source: Source,
    *,
    architecture: Architecture = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> Tokenizer:
    """A tokenizer with the weights of a checkpoint, in eval mode.

    source: as for `load_generator`. A transformers model that holds its own tokenizer, such as Janus, is one too.
    architecture: "vq-16", "vq-8", a `VQConfig` or a mapping of its fields. By default what the file says of itself, or
        else what its tensors imply.

    Raises:
        VarpiError: the source cannot be read, its tensors contradict the architecture, or they are not complete.
    """
    if sizes_only() and not is_here(source):
        named = _by_name(source, "tokenizer", architecture, None, device, dtype)
        assert isinstance(named, Tokenizer)
        return named
    tokenizer = _load(_open(source, "tokenizer"), "tokenizer", architecture, None, device, dtype, {})
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


def fresh(kind: Part, architecture: Architecture, what: str) -> Stored:
    """A model without any training, of a configuration or a mapping of its fields; `what` names it in errors."""
    family = family_of_fields(kind)
    assert family.config is not None
    assert family.build is not None
    if isinstance(architecture, Mapping):
        architecture = config_of(family.config, architecture, what)
    if not isinstance(architecture, family.config):
        raise VarpiError(f"{what} must list the fields of {family.config.__name__} to start afresh")
    with torch.device("meta"):
        size = sum(parameter.nbytes for parameter in family.build(architecture).parameters())
    if sizes_only():
        with torch.device("meta"):
            return family.build(architecture)
    check_memory(size, f"the weights of {what}")
    return family.build(architecture)


def _by_name(
    source: Source,
    kind: Part,
    architecture: Architecture,
    image_size: int | None,
    device: torch.device | str,
    dtype: torch.dtype | str,
) -> Stored:
    """A model of which nothing but its architecture is here."""
    model = without_numbers(shape_of(kind, architecture, image_size, str(source)), device, dtype)
    model.reset_tables()
    return model.eval()


@dataclass(frozen=True)
class _Opened:
    """A source, read."""

    where: str
    """What to call it in messages."""
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    own: dict[str, Any] | None
    """The description that varpi wrote into the file: "kind", "architecture" (the family), "config"."""
    hf_config: dict[str, Any]
    """The config.json beside it."""
    folder: Any


def _open(source: Source, kind: Part) -> _Opened:
    if isinstance(source, str) and source in EMBEDDED:
        source = embedded(source, kind)
    checkpoint = read_checkpoint(source)
    where = "state dict" if isinstance(source, Mapping) else os.fspath(source)
    own = None
    if "varpi" in checkpoint.metadata:
        try:
            description = json.loads(checkpoint.metadata["varpi"])
            version = description["format"]
            own = {name: description[name] for name in ("kind", "architecture", "config")}
            own["config"] = dict(own["config"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise VarpiError(f"{where}: its metadata 'varpi' is not a description that varpi wrote") from error
        if version != FORMAT:
            raise VarpiError(f"{where}: has format {version!r:.40}; this varpi reads format {FORMAT}: update varpi")
    return _Opened(where, checkpoint.tensors, checkpoint.metadata, own, checkpoint.config(), checkpoint.folder)


def _load(
    opened: _Opened,
    kind: Part,
    architecture: Architecture,
    image_size: int | None,
    device: torch.device | str,
    dtype: torch.dtype | str,
    compat: Mapping[str, bool],
) -> Stored:
    family = family_of(
        opened.where,
        kind,
        own=None if opened.own is None else str(opened.own["architecture"]),
        architecture=architecture,
        hf_config=opened.hf_config,
        tensors=opened.tensors,
    )
    assemble = getattr(family, kind)
    if assemble is None:
        held = "tokenizer" if kind == "generator" else "generator"
        raise VarpiError(f"{opened.where}: holds a {held}, not a {kind}")
    config: dict[str, Any] = {}
    if opened.own is not None:
        config = opened.own["config"]
    elif opened.hf_config.get("model_type") in family.model_types:
        config = opened.hf_config
    source = Pretrained(
        opened.where,
        opened.tensors,
        config,
        opened.folder,
        dict(compat),
        architecture=architecture,
        image_size=image_size,
    )
    model, tensors, said, name_in_file = assemble(source)
    if image_size is not None and image_size not in [factor * model.grid for factor in DOWNSAMPLES]:
        raise VarpiError(
            f"{opened.where}: image_size is {image_size}, but the generator's grid is {model.grid}x{model.grid}: it "
            f"makes images of {' or '.join(str(factor * model.grid) for factor in DOWNSAMPLES)} pixels"
        )
    fill(model, tensors, name_in_file, opened.where, said, device, dtype)
    model.reset_tables()
    return model.eval()
