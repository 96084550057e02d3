"""The families of models that varpi knows, and which of them a checkpoint belongs to."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch

import varpi.generators
import varpi.tokenizers
from varpi.errors import VarpiError
from varpi.runtime.pretrained import Family, Stored, config_of
from varpi.runtime.sources import few

Part = Literal["generator", "tokenizer"]


@lru_cache
def families() -> dict[str, Family]:
    """Every family, by name: the FAMILY of each module of `varpi.generators` and `varpi.tokenizers` that has one."""
    modules = (
        importlib.import_module(f"{package.__name__}.{entry.name}")
        for package in (varpi.generators, varpi.tokenizers)
        for entry in pkgutil.iter_modules(package.__path__)
    )
    return {module.FAMILY.name: module.FAMILY for module in modules if hasattr(module, "FAMILY")}


def family_of(
    where: str,
    kind: Part,
    *,
    own: str | None,
    architecture: Any,
    hf_config: Mapping[str, Any],
    tensors: Iterable[str],
) -> Family:
    """The family that makes a `kind` of a checkpoint.

    own: its name in a file that varpi wrote; None: another wrote it. Otherwise the architecture that the caller gave
    tells it, or else config.json beside the weights, or else the names of the tensors.

    Raises VarpiError when none does.
    """
    tensors = list(tensors)
    known = [family for family in families().values() if set(family.known_by) & set(tensors)]
    named = None if architecture is None else _by_architecture(architecture, kind, tensors)
    if own is not None:
        if own not in families():
            raise VarpiError(f"{where}: holds a {own!r} {kind}, which this varpi does not know: update varpi")
        if named not in (None, families()[own]):
            raise VarpiError(f"{where}: holds a {own!r} model, but the architecture that was given is {architecture!r}")
        return families()[own]
    if named is not None and (named in known or not named.known_by):
        return named
    if named is None and hf_config:
        model_type = hf_config["model_type"]
        types = {name: family for family in families().values() for name in family.model_types}
        if model_type not in types:
            raise VarpiError(
                f"{where}: its config.json says model_type {model_type!r}; varpi knows {', '.join(sorted(types))}"
            )
        return types[model_type]
    if named is None and (able := [family for family in known if getattr(family, kind) is not None]):
        return able[0]
    hint = f"; this is a {'tokenizer' if kind == 'generator' else 'generator'}" if known else ""
    raise VarpiError(f"{where}: no {kind} that varpi knows; its tensors are {few(tensors)}{hint}")


def shape_of(kind: Part, architecture: Any, image_size: int | None, what: str) -> Stored:
    """A model without weights, on the meta device, by an architecture's name or the fields of a configuration.

    Raises VarpiError where the name is unknown, or there is none; `what` calls the source whose weights are not here.
    """
    if architecture is None:
        raise VarpiError(f"{what}: is not here; name its {kind}.architecture to reckon with its sizes")
    family = _by_architecture(architecture, kind, [])
    if isinstance(architecture, str):
        return family.shapes[kind](architecture, image_size)
    assert family.config is not None
    assert family.build is not None
    config = architecture
    if isinstance(architecture, Mapping):
        config = config_of(family.config, architecture, f"{kind}.architecture")
    with torch.device("meta"):
        return family.build(config)


def family_of_fields(kind: Part) -> Family:
    """The family whose shape can be given by fields, for a model begun afresh: the first of that kind."""
    return next(family for family in families().values() if family.config and getattr(family, kind))


def _by_architecture(architecture: Any, kind: Part, tensors: list[str]) -> Family:
    """By a name, a configuration, or a mapping of fields; a mapping fits the family that knows the tensors."""
    able = [family for family in families().values() if getattr(family, kind) is not None]
    if isinstance(architecture, str):
        for family in able:
            if architecture.lower() in family.architectures:
                return family
        raise VarpiError(_unknown(architecture, kind, [name for family in able for name in family.architectures]))
    by_fields = [family for family in able if family.config is not None]
    if isinstance(architecture, Mapping):
        knowing = (family for family in by_fields if set(family.known_by) & set(tensors))
        return next(knowing, family_of_fields(kind))
    for family in by_fields:
        assert family.config is not None
        if isinstance(architecture, family.config):
            return family
    expected = " or ".join(family.config.__name__ for family in by_fields if family.config)
    raise VarpiError(
        f"architecture is of type {type(architecture).__name__}; expected a name, a mapping of fields, or a {expected}"
    )


def _unknown(name: str, kind: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"no {kind} architecture is called {name!r}; {hint}"
