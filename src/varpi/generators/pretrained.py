"""Families of generators on transformers' models: one module of this package each, named after its `model_type`.

A family's module is found by the `model_type` of a checkpoint's config.json, or by the first word of an architecture's
name ("janus-pro-1b"), and imported only then. Adding a family adds a module.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

import varpi.generators
from varpi.tokenizers import Tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint as it was read, for a family to make sense of."""

    where: str
    """What to call it in errors."""
    tensors: dict[str, Tensor]
    """By their names in the file; memory-mapped perhaps, never to be modified."""
    config: dict[str, Any]
    """The contents of its config.json."""
    folder: Path | None = None
    """Where the files of its text tokenizer lie, if there are any."""
    compat: dict[str, bool] = field(default_factory=dict)
    """Where to follow released code against its own model; each family knows its own names."""


class Family(Protocol):
    """What a family's module offers."""

    MODEL_TYPES: tuple[str, ...]
    """The values of "model_type" that it reads; the first is the family's name, and its module's."""
    ARCHITECTURES: tuple[str, ...]
    """Names of its released models; each begins with the family's name and a dash."""

    def config_for(self, architecture: str) -> Any:
        """Transformers' configuration of a released model, one of `ARCHITECTURES`."""
        ...

    def assemble(self, source: Pretrained) -> "tuple[PretrainedGenerator, dict[str, Tensor]]":
        """The generator on the meta device, and its weights under the names of its state dict.

        The caller checks that no weight is missing, left over, of the wrong shape or not finite.
        """
        ...

    def assemble_tokenizer(self, source: Pretrained) -> tuple[Tokenizer, dict[str, Tensor]]:
        """The image tokenizer inside the same checkpoint, likewise."""
        ...


@runtime_checkable
class PretrainedGenerator(Protocol):
    """What such a generator offers beside `Generator`."""

    folder: Path | None
    """Where the files of the text tokenizer lie; they are copied beside saved weights."""
    hf_config: dict[str, Any]
    """What config.json holds when the generator is saved."""

    def name_in_file(self, name: str) -> str | None:
        """Transformers' name of an entry of the state dict; None for one that is not written, as a tied copy is."""
        ...


@lru_cache
def families() -> dict[str, Family]:
    """Every family in this package, by name."""
    modules = (
        importlib.import_module(f"{varpi.generators.__name__}.{entry.name}")
        for entry in pkgutil.iter_modules(varpi.generators.__path__)
    )
    return {module.MODEL_TYPES[0]: cast(Family, module) for module in modules if hasattr(module, "MODEL_TYPES")}


def family_of(model_type: str) -> Family | None:
    """The family that reads checkpoints of this `model_type`."""
    return next((family for family in families().values() if model_type in family.MODEL_TYPES), None)
