"""Checkpoint files: reading them without trusting them, and writing them so that equal content gives equal bytes."""

import argparse
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.runtime.files import line, open_regular, read_json
from varpi.runtime.sizes import sizes_only, without_numbers
from varpi.runtime.sources import Source, few, find, shards_of

WRAPPERS = ("model", "module", "state_dict")
WRAPPED = 8
"""Wrappers inside each other."""
NAME_PREFIXES = re.compile(r"(?:module\.|_orig_mod\.|gpt_model\.)+")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the safetensors format calls them."""


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
        if path is None or not os.path.lexists(path):
            return {}
        config = read_json(path)
        return config if isinstance(config, dict) and isinstance(config.get("model_type"), str) else {}


def read_checkpoint(source: Source) -> Checkpoint:
    """The tensors of a checkpoint by name, and what else is known of it.

    Wrappers ("model", "module", "state_dict", tried in this order) are opened and the prefixes that DDP, torch.compile
    and LlamaGen's trainers put before the names are taken off.

    Raises:
        VarpiError: nothing is there, the file is damaged, or it holds other things than plain tensors.
    """
    if isinstance(source, Mapping):
        return Checkpoint(_unwrap(source, "state dict"), {}, None)
    if not isinstance(source, str | os.PathLike):
        raise VarpiError(f"a checkpoint is a path, a Hub id or a state dict, not of type {type(source).__name__}")
    path = find(source)
    metadata: dict[str, str] = {}
    if path.name.endswith(".index.json"):
        content = _read_shards(path)
    elif path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path)
    else:
        content = _read_pickle(path)
    tensors = _unwrap(content, path)
    for name, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise VarpiError(f"{path}: {name} has shape {tuple(tensor.shape)}, more than the file holds")
    return Checkpoint(tensors, metadata, path.parent)


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write dense tensors of the CPU as safetensors; the same tensors and metadata give the same bytes.

    The safetensors package orders the metadata anew in each process.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # so that each lies aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        tensor, begin = tensors[name], end
        if tensor.dtype not in DTYPES:
            raise VarpiError(f"{path}: {name} is {tensor.dtype}, which cannot be written")
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        open_regular(path).close()
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise VarpiError(f"{path}: not a readable safetensors file, truncated perhaps ({line(error)})") from error


def _read_shards(index: Path) -> dict[str, Any]:
    content: dict[str, Any] = {}
    shards = shards_of(index)
    for name in shards:
        shard = index.parent / name
        if not os.path.isfile(shard):
            raise VarpiError(f"{index}: its shard {few([name])} is missing")
        content |= _read_safetensors(shard)[0] if shard.suffix == ".safetensors" else _read_pickle(shard)
    if absent := [tensor for listed in shards.values() for tensor in listed if tensor not in content]:
        raise VarpiError(f"{index}: {len(absent)} listed tensors are in no shard: {few(absent)}")
    return content


def _read_pickle(path: Path) -> dict[Any, Any]:
    """A file of `torch.save`, of which only plain data is let in; memory-mapped where its format allows."""
    damaged = f"{path}: not a readable PyTorch checkpoint: damaged, truncated, or not one at all"
    try:
        with open_regular(path) as file:
            zipped = file.read(4) == b"PK\x03\x04"  # as torch tells it
        if zipped:
            with zipfile.ZipFile(path) as archive:
                # torch.save never compresses; what inflates could take any amount of memory
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise VarpiError(f"{path}: claims to hold more than its {path.stat().st_size:,} bytes; refused")
        # LlamaGen's trainers store their argparse.Namespace beside the weights: plain data, so let it pass.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except VarpiError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if found:
            raise VarpiError(
                f"{path}: holds {found[1]}, not only plain tensors, and is refused, for loading it could run code; "
                "save its state dict alone, best as .safetensors"
            ) from error
        raise VarpiError(damaged) from error
    except Exception as error:  # what the unpickler raises on arbitrary bytes is not specified
        raise VarpiError(damaged) from error
    if not isinstance(content, Mapping):
        raise VarpiError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return dict(content)


def _unwrap(content: Mapping[Any, Any], where: object) -> dict[str, Tensor]:
    """The dictionary of tensors inside its wrappers, under names without prefixes."""
    depth = 0
    while wrapper := next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None):
        content, depth = content[wrapper], depth + 1
        if depth > WRAPPED:
            raise VarpiError(f"{where}: its tensors lie more than {WRAPPED} dictionaries deep, or it holds itself")
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise VarpiError(f"{where}: has an entry called {name!r:.80}; the names of tensors are strings")
        if not isinstance(value, Tensor):
            raise VarpiError(
                f"{where}: entry {name!r:.80} is a {type(value).__name__}, not a tensor; a checkpoint is a dictionary "
                f"of tensors, by itself or under one of {', '.join(map(repr, WRAPPERS))}"
            )
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise VarpiError(f"{where}: {name} is not a dense tensor with its numbers")
        plain = name.replace("._orig_mod.", ".")
        if prefixes := NAME_PREFIXES.match(plain):
            plain = plain[prefixes.end() :]
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


def fill(
    model: nn.Module,
    tensors: dict[str, Tensor],
    name_in_file: Callable[[str], str],
    where: str,
    said: str,
    device: torch.device | str,
    dtype: torch.dtype | str,
) -> None:
    """Give a model on the meta device its weights: all of them, and none left over. Empties `tensors`.

    Each tensor is copied by itself, so that only one copy of a mapped file is ever in memory and nothing the model does
    reaches the source.
    """
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise VarpiError(f"dtype is {dtype}; weights need a floating-point one, such as torch.float32 or 'bfloat16'")
    dtype = named
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise VarpiError(f"device is {device!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise VarpiError(f"device is '{device}'; torch can use {torch.cuda.device_count()} CUDA device(s) here")
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
    if sizes_only():
        tensors.clear()
        without_numbers(model, device, dtype)
        return
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
