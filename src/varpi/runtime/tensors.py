"""Checkpoint files: finding them, and reading them without trusting them."""

import argparse
import hashlib
import importlib.resources
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.runtime import hub
from varpi.runtime.files import line

Source = str | os.PathLike[str] | Mapping[str, Any]
"""A file, a directory, a Hub id ("org/name[@revision][:file]"), or a state dict."""

EMBEDDED = ("digits",)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
WRAPPERS = ("model", "module", "state_dict")
PREFIXES = ("module.", "_orig_mod.", "gpt_model.")
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What lies beside the weights of a transformers model and belongs to it."""


class Checkpoint(NamedTuple):
    """What a source holds."""

    tensors: dict[str, Tensor]
    """By name; those of a file may be memory-mapped: copy what you keep."""
    metadata: dict[str, str]
    """Of a safetensors file."""
    folder: Path | None
    """Where its file lies, and perhaps `SIDE_FILES` beside it; None for a state dict."""

    def config(self) -> dict[str, Any]:
        """The config.json beside the weights of a transformers model; empty where there is none."""
        path = self.folder / "config.json" if self.folder is not None else None
        if path is None or not path.is_file():
            return {}
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise VarpiError(f"{path}: cannot be read as JSON ({line(error)})") from error
        return config if isinstance(config, dict) and "model_type" in config else {}


def read_checkpoint(source: Source) -> Checkpoint:
    """The tensors of a checkpoint by name, and what else is known of it.

    Wrappers ("model", "module", "state_dict", tried in this order) are opened and the prefixes that DDP, torch.compile
    and LlamaGen's trainers put before the names are taken off.

    Raises:
        VarpiError: nothing is there, the file is damaged, or it holds other things than plain tensors.
    """
    if isinstance(source, Mapping):
        return Checkpoint(_unwrap(source, "state dict"), {}, None)
    path = find(source)
    metadata: dict[str, str] | None = None
    if path.name.endswith(".index.json"):
        tensors = _read_shards(path)
    elif path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    else:
        tensors = _read_pickle(path)
    return Checkpoint(_unwrap(tensors, path), metadata or {}, path.parent)


def find(source: str | os.PathLike[str]) -> Path:
    """The one file that `source` means: a weights file or the index of a sharded one."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = [entry.name for entry in path.iterdir() if entry.is_file()]
        return path / _choose(files, f"{source}", f"{path}{os.sep}<file>")
    if path.is_file():
        if path.suffix not in SUFFIXES and not path.name.endswith(".index.json"):
            raise VarpiError(f"{source}: not a checkpoint file; the name must end in one of {', '.join(SUFFIXES)}")
        return path
    match = hub.ID.fullmatch(os.fspath(source))
    if match and Path(match["repo"]).suffix not in SUFFIXES:
        return _download(match["repo"], match["revision"], match["file"])
    raise VarpiError(
        f"{source}: no such file or directory, and neither a Hub id (org/name[@revision][:file]) nor an embedded pair "
        f"({', '.join(EMBEDDED)})"
    )


def embedded(name: str, kind: str) -> Path:
    """The package's own weights: of the pair `name`, the "generator", the "tokenizer" or the "judge"."""
    path = Path(str(importlib.resources.files("varpi.embedded") / f"{name}-{kind}.safetensors"))
    if not path.is_file():
        raise VarpiError(f"{path}: the embedded {kind} {name!r} is not in this installation; install varpi again")
    return path


def _choose(files: Iterable[str], where: str, how: str) -> str:
    """Among the names in a directory, the file to load."""
    files = sorted(files)
    for preferred in ("model.safetensors", "consolidated.pth"):
        if preferred in files:
            return preferred
    for endings in ((".safetensors.index.json",), (".bin.index.json",), SUFFIXES):
        candidates = [name for name in files if name.endswith(endings)]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise VarpiError(f"{where}: holds {len(candidates)} checkpoints ({few(candidates)}); name one: {how}")
    raise VarpiError(f"{where}: holds no checkpoint (*{', *'.join(SUFFIXES)})")


def _download(repo: str, revision: str | None, file: str | None) -> Path:
    """The weights file of a Hub repository, with what belongs to it beside it."""
    repository = hub.Repository(repo, revision)
    top = [name for name in repository.names if "/" not in name]
    path = repository.file(file or _choose(top, repository.where, f"{repository.where}:<file>"))
    if path.name.endswith(".index.json"):
        for shard in _shards(path):
            repository.file(f"{Path(file).parent / shard}" if file else shard)
    for name in SIDE_FILES:
        if name in top:
            repository.file(name)
    return path


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise VarpiError(f"{path}: not a readable safetensors file, truncated perhaps ({line(error)})") from error


def _shards(index: Path) -> list[str]:
    """The file names that the index of a sharded checkpoint lists."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise VarpiError(f"{index}: not a readable index of a sharded checkpoint ({line(error)})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise VarpiError(f"{index}: lists {name!r}, which is not the name of a file beside it")
    return names


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in _shards(index):
        shard = index.parent / name
        if not shard.is_file():
            raise VarpiError(f"{index}: its shard {name} is missing")
        tensors |= _read_safetensors(shard)[0] if shard.suffix == ".safetensors" else _read_pickle(shard)
    listed = json.loads(index.read_text())["weight_map"]
    if absent := [key for key in listed if key not in tensors]:
        raise VarpiError(f"{index}: {len(absent)} listed tensors are in no shard: {few(absent)}")
    return tensors


def _read_pickle(path: Path) -> dict[str, Any]:
    """A file of `torch.save`, of which only plain data is let in; memory-mapped where its format allows."""
    try:
        # LlamaGen's trainers store their argparse.Namespace beside the weights: plain data, so let it pass.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if found:
            raise VarpiError(
                f"{path}: holds {found[1]}, not only plain tensors, and is refused, for loading it could run code; "
                "save its state dict alone, best as .safetensors"
            ) from error
        raise VarpiError(f"{path}: not a readable PyTorch checkpoint: damaged, truncated, or not one at all") from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        struct.error,
    ) as error:
        # What the unpickler raises on arbitrary bytes is not specified.
        raise VarpiError(f"{path}: not a readable PyTorch checkpoint: damaged, truncated, or not one at all") from error
    if not isinstance(content, Mapping):
        raise VarpiError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return dict(content)


def _unwrap(content: Mapping[str, Any], where: object) -> dict[str, Tensor]:
    """The dictionary of tensors inside its wrappers, under names without prefixes."""
    while wrapper := next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content = content[wrapper]
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise VarpiError(
                f"{where}: entry {name!r} is a {type(value).__name__}, not a tensor; a checkpoint is a dictionary of "
                f"tensors, by itself or under one of {', '.join(map(repr, WRAPPERS))}"
            )
        plain = name.replace("._orig_mod.", ".")
        while prefix := next((prefix for prefix in PREFIXES if plain.startswith(prefix)), None):
            plain = plain.removeprefix(prefix)
        if plain in tensors:
            raise VarpiError(f"{where}: two entries are called {plain!r} once prefixes such as 'module.' are taken off")
        tensors[plain] = value
    if not tensors:
        raise VarpiError(f"{where}: holds no tensors")
    return tensors


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def few(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    name_in_file: Callable[[str], str],
    where: str,
    said: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Give a model on the meta device its weights: all of them, and none left over. Empties `tensors`.

    Each tensor is copied by itself, so that only one copy of a mapped file is ever in memory and nothing the model does
    reaches the source.
    """
    if not dtype.is_floating_point:
        raise VarpiError(f"dtype is {dtype}; weights need a floating-point one")
    expected = {name_in_file(name): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of the wrong shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
            for name, (_, shape) in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(found)} {what}: {few(found)}" for what, found in problems.items() if found)
        raise VarpiError(f"{where}: does not fit {said}: {listed}")
    weights: dict[str, Tensor] = {}
    own = model.state_dict()
    for theirs, (ours, _) in expected.items():
        tensor = tensors.pop(theirs).detach()
        if not own[ours].is_floating_point():  # a counter
            weights[ours] = tensor.to(device, own[ours].dtype, copy=True)
            continue
        if not tensor.is_floating_point():
            raise VarpiError(f"{where}: {theirs} is {tensor.dtype}; weights must be floating-point numbers")
        weights[ours] = tensor.to(device, dtype, copy=True).contiguous()
        if not weights[ours].isfinite().all():
            raise VarpiError(f"{where}: {theirs} holds NaN or infinite values (as {dtype})")
    model.load_state_dict(weights, strict=True, assign=True)
