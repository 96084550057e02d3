"""Weights out: in varpi's own form, and in that of the original code."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from varpi.errors import VarpiError
from varpi.generators import Generator
from varpi.runtime.files import write_aside, write_text
from varpi.runtime.pretrained import Stored
from varpi.runtime.sources import SIDE_FILES, few
from varpi.runtime.tensors import write_safetensors
from varpi.tokenizers import Tokenizer
from varpi.weights import lora
from varpi.weights.class_names import class_names_metadata
from varpi.weights.families import families
from varpi.weights.load import FORMAT


def save_generator(
    generator: Generator,
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a generator as safetensors with its configuration and the names of its classes inside.

    The same weights and metadata give the same bytes.

    state_dict: the whole weights, when the generator holds only this process's shards.
    extra: further metadata.

    Raises:
        VarpiError: the file cannot be written, for instance for lack of space; an older one is left as it is.
    """
    _save(generator, "generator", path, state_dict, {**(extra or {}), **class_names_metadata(generator)})


def save_tokenizer(
    tokenizer: Tokenizer,
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a tokenizer, as `save_generator` does."""
    _save(tokenizer, "tokenizer", path, state_dict, extra or {})


def to_original(model: Generator | Tokenizer) -> dict[str, Tensor]:
    """The weights on the CPU under the names of the released files (LlamaGen's, or transformers' for its models).

    Not copies where they are there already.
    """
    return _renamed(model, model.state_dict())


def export_original(model: Generator | Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write what the original code loads.

    LlamaGen and its tokenizers: a file, safetensors if `path` ends so, otherwise `torch.save`. A generator becomes a
    plain dictionary of tensors (LlamaGen's `--from-fsdp` form), a tokenizer {"model": tensors}. A transformers model: a
    directory for `from_pretrained`.

    Raises:
        VarpiError: the file cannot be written; an older one is left as it is.
    """
    tensors = to_original(model)
    if model.hf_config is not None:
        Path(path).mkdir(parents=True, exist_ok=True)
        _write_side_files(model, Path(path))
        path = Path(path, "model.safetensors")
    if os.fspath(path).endswith(".safetensors"):
        metadata = {"format": "pt", **class_names_metadata(model)}
        write_aside(path, lambda aside: write_safetensors(tensors, aside, metadata), size=_size(tensors))
    else:
        content = model.original_content(tensors)
        write_aside(path, lambda aside: torch.save(content, aside), size=_size(tensors))


def _save(
    model: Stored,
    kind: str,
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None,
    extra: Mapping[str, str],
) -> None:
    if model.family not in families():
        raise VarpiError(f"varpi has no file format for a {type(model).__name__}")
    own = model.state_dict()
    if state_dict is not None and set(state_dict) != set(own):
        raise VarpiError(f"{path}: not the tensors of this {kind}: {few(sorted(set(state_dict) ^ set(own)))}")
    state_dict = own if state_dict is None else state_dict
    if model.hf_config is not None:
        tensors = _renamed(model, state_dict)
        _write_side_files(model, Path(path).parent)
    else:
        tensors = _dense(lora.merge(model, state_dict))
    description = {"format": FORMAT, "kind": kind, "architecture": model.family, "config": model.stored_config()}
    metadata = {"format": "pt", **extra, "varpi": json.dumps(description)}
    write_aside(path, lambda aside: write_safetensors(tensors, aside, metadata), size=_size(tensors))


def _renamed(model: Stored, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights, adapters merged, under the names of its original files."""
    tensors = _dense(lora.merge(model, state_dict))
    return {new: tensor for name, tensor in tensors.items() if (new := model.name_in_file(name)) is not None}


def _write_side_files(model: Stored, folder: Path) -> None:
    """config.json, and what else `from_pretrained` looks for."""
    write_text(folder / "config.json", json.dumps(model.hf_config, indent=2) + "\n")
    for name in SIDE_FILES[1:]:
        if model.folder is not None and (model.folder / name).is_file() and model.folder.resolve() != folder.resolve():
            shutil.copyfile(model.folder / name, folder / name)


def _dense(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each dense in a storage of its own, as file formats want them."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    return {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in tensors.items()
    }


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
