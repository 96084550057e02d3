"""Networks of transformers and open_clip, loaded strictly, frozen, in float32; known by their weights' SHA-256."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from varpi.errors import VarpiError
from varpi.runtime.files import line
from varpi.runtime.sources import few, find
from varpi.runtime.tensors import fill, read_checkpoint, sha256_of

ClipArchitecture = str | Mapping[str, Any]
"""A name that open_clip knows, or such a configuration (embed_dim, vision_cfg, text_cfg)."""


def load_transformers(name: str, source: str | Path, what: str) -> tuple[Any, Path, str]:
    """A model of transformers' class `name`, frozen, float32; its directory; the SHA-256 of its weights.

    source: a directory in transformers' layout, or a Hub id. what: what it is for, in the message.
    Raises VarpiError when it is not there, is of another class or lacks weights, or a package is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise VarpiError(f"{what} needs transformers: pip install 'varpi[evaluation,text]'") from error
    kind = getattr(transformers, name)
    weights = find_weights(source, what)
    folder, expected = weights.parent, kind.config_class.model_type
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise VarpiError(f"{what}: {source}: its config.json cannot be read ({line(error)})") from error
    if found != expected:
        raise VarpiError(f"{what}: {source}: is a model of type {found!r}; expected {expected!r}")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except ImportError as error:
        raise VarpiError(
            f"{what} needs another package: pip install 'varpi[evaluation,text]' ({line(error)})"
        ) from error
    except Exception as error:  # which exception a damaged file raises depends on its format
        raise VarpiError(f"{what}: {source}: its weights cannot be loaded ({line(error)})") from error
    missing = sorted(set(report["missing_keys"]) & dict(model.named_parameters()).keys())
    if missing:  # transformers draws these at random
        raise VarpiError(f"{what}: {source}: {len(missing)} weights are missing ({few(missing, 3)})")
    return model.eval().requires_grad_(False), folder, sha256_of(weights)


def load_open_clip(architecture: ClipArchitecture, source: str | Path, what: str) -> tuple[Any, str]:
    """A CLIP of open_clip, frozen, float32, with the weights of a file, and their SHA-256.

    source, what: as for `load_transformers`. Raises VarpiError when the weights are not there or do not fit exactly.
    """
    try:
        import open_clip
    except ImportError as error:
        raise VarpiError(f"{what} needs {error.name}: pip install 'varpi[evaluation]'") from error
    config = open_clip.get_model_config(architecture) if isinstance(architecture, str) else dict(architecture)
    if config is None:
        raise VarpiError(f"{what}: open_clip knows no architecture {architecture!r}")
    weights = find_weights(source, what)
    tensors = read_checkpoint(weights).tensors
    model = open_clip.CLIP(**config)
    fill(model, tensors, str, f"{what}: {weights}", architecture_name(architecture), "cpu", torch.float32)
    return model.eval().requires_grad_(False), sha256_of(weights)


def architecture_name(architecture: ClipArchitecture) -> str:
    """What to call an architecture of open_clip in messages and results."""
    return architecture if isinstance(architecture, str) else "a configuration of open_clip"


def find_weights(source: str | Path, what: str) -> Path:
    """The weights file that `source` means, downloaded if need be; the message of a failure says what it is for."""
    try:
        return find(source)
    except VarpiError as error:
        raise VarpiError(f"{what}: {error}") from error
