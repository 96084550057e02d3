"""Weights in, from LlamaGen's files, transformers' or ours, strictly; weights out, in either form.

A checkpoint is read whole or refused: every tensor that the model needs must be there, with its shape, finite, and
nothing may be left over. What refuses says which tensors, and which side expected what.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from varpi.errors import VarpiError
from varpi.generators import Generator, LlamaGen, LlamaGenConfig
from varpi.generators.pretrained import Family, Pretrained, PretrainedGenerator, families, family_of
from varpi.runtime.files import write_aside, write_text
from varpi.runtime.tensors import EMBEDDED, SIDE_FILES, Source, embedded, few, fill, read_checkpoint, sha256_of
from varpi.tokenizers import VQ, Tokenizer, VQConfig
from varpi.weights import lora, names
from varpi.weights.class_names import class_names_metadata, read_class_names

__all__ = [
    "EMBEDDED",
    "Source",
    "check_pair",
    "embedded",
    "export_original",
    "load_generator",
    "load_tokenizer",
    "read_checkpoint",
    "save_generator",
    "save_tokenizer",
    "sha256_of",
    "to_original",
]

FORMAT = 1
"""Version of the description inside our own files."""
DOWNSAMPLES = (4, 8, 16)

Config = TypeVar("Config", LlamaGenConfig, VQConfig)


# -- in


def load_generator(
    source: Source,
    *,
    architecture: str | LlamaGenConfig | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    compat: Mapping[str, bool] | None = None,
) -> Generator:
    """A generator with the weights of a checkpoint, in eval mode.

    source: a file (.pt, .pth, .safetensors), a directory, a Hub id "org/name[@revision][:file]", a state dict, or the
        name of an embedded pair ("digits").
    architecture: "llamagen-c2i-xxl", "janus-pro-1b" and the like (`names.architectures`), or a `LlamaGenConfig`. By
        default what the file, or the config.json beside it, says of itself, or else what its tensors imply.
    image_size: pixels per side; needed for LlamaGen's own files, which do not tell the grid. With a 16-fold tokenizer
        the grid is image_size / 16; for another tokenizer pass a `LlamaGenConfig`.
    compat: where to follow released code against the model itself; each family of generators knows its own switches.

    Raises:
        VarpiError: the source cannot be read, its tensors contradict the architecture, or they are not complete.
    """
    opened = _open(source, "generator")
    if (family := _family(opened, architecture)) is not None:
        return _load_pretrained(family, opened, architecture, image_size, device, dtype, compat or {})
    if compat:
        raise VarpiError(f"generator.compat: LlamaGen has no switch {few(compat)}")
    where, tensors, stored = opened.where, opened.tensors, opened.own_config(LlamaGenConfig)
    native = stored is not None or "token_embedding.weight" in tensors
    tensors = {name: tensor for name, tensor in tensors.items() if not names.is_table(name)}
    if "tok_embeddings.weight" not in tensors and not native:
        hint = "; this is a tokenizer" if "quantize.embedding.weight" in tensors else ""
        raise VarpiError(f"{where}: no generator that varpi knows; its tensors are {few(tensors)}{hint}")
    facts = names.generator_facts({names.original_name(name): tensor for name, tensor in tensors.items()})
    if isinstance(architecture, LlamaGenConfig):
        config, said = architecture, "the given LlamaGenConfig"
    elif architecture is not None:
        config = names.generator_config(architecture, _grid(where, stored, image_size))
        said = f"architecture {architecture!r}"
    elif stored is not None:
        config, said = stored, "the configuration inside the file"
    else:
        config = names.infer_generator(where, facts, _grid(where, None, image_size))
        said = "what its tensors imply"
    _check_image_size(where, image_size, config.grid)
    _refuse_contradiction(where, "the tensors say", facts, said, config)
    if stored is not None:
        rest = {field: getattr(stored, field) for field in ("n_head", "grid", "rope_base", "norm_eps")}
        _refuse_contradiction(where, "the configuration inside the file says", rest, said, config)
    with torch.device("meta"):
        generator = LlamaGen(config)
    fill(generator, tensors, str if native else names.original_name, where, said, device, dtype)
    generator.reset_tables()
    generator.class_names = opened.class_names
    return generator.eval()


def load_tokenizer(
    source: Source,
    *,
    architecture: str | VQConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tokenizer:
    """A tokenizer with the weights of a checkpoint, in eval mode.

    source: as for `load_generator`.
        A transformers model that holds its own tokenizer, such as Janus, is a source too.
    architecture: "vq-16", "vq-8" or a `VQConfig`. By default what the file says of itself, or else what its tensors
        imply.

    Raises:
        VarpiError: the source cannot be read, its tensors contradict the architecture, or they are not complete.
    """
    opened = _open(source, "tokenizer")
    if (family := _family(opened, architecture)) is not None:
        its_own: Any
        its_own, tensors = family.assemble_tokenizer(_pretrained(family, opened, architecture, {}))
        fill(its_own, tensors, str, opened.where, "its configuration", device, dtype)
        return its_own.eval()
    where, tensors, stored = opened.where, opened.tensors, opened.own_config(VQConfig)
    if "quantize.embedding.weight" not in tensors:
        hint = "; this is a generator" if {"tok_embeddings.weight", "token_embedding.weight"} & set(tensors) else ""
        raise VarpiError(f"{where}: no tokenizer that varpi knows; its tensors are {few(tensors)}{hint}")
    facts = names.tokenizer_facts(tensors)
    if isinstance(architecture, VQConfig):
        config, said = architecture, "the given VQConfig"
    elif architecture is not None:
        config, said = names.tokenizer_config(architecture), f"architecture {architecture!r}"
    elif stored is not None:
        config, said = stored, "the configuration inside the file"
    else:
        config = names.infer_tokenizer(where, facts)
        said = "what its tensors imply"
    _refuse_contradiction(where, "the tensors say", facts, said, config)
    if stored is not None:
        rest = {"norm_groups": stored.norm_groups}
        _refuse_contradiction(where, "the configuration inside the file says", rest, said, config)
    with torch.device("meta"):
        tokenizer = VQ(config)
    fill(tokenizer, tensors, str, where, said, device, dtype)
    return tokenizer.eval()


def check_pair(generator: Generator, tokenizer: Tokenizer) -> None:
    """Refuse a generator and a tokenizer that do not speak of the same codes."""
    if generator.vocab_size != tokenizer.codebook_size:
        raise VarpiError(
            f"generator and tokenizer do not belong together: the generator's vocabulary has {generator.vocab_size} "
            f"tokens, the tokenizer's codebook {tokenizer.codebook_size}"
        )


@dataclass(frozen=True)
class _Opened:
    """A source, read."""

    where: str
    """What to call it in messages."""
    tensors: dict[str, Tensor]
    stored: dict[str, Any] | None
    """The description that varpi wrote into the file: "kind", "architecture", "config"."""
    hf_config: dict[str, Any]
    """The config.json beside it."""
    folder: Path | None
    class_names: tuple[str, ...] | None

    def own_config(self, config_type: type[Config]) -> Config | None:
        """The stored configuration, when varpi wrote the file."""
        if self.stored is None:
            return None
        if self.stored["architecture"] != _ARCHITECTURE[config_type]:
            raise VarpiError(
                f"{self.where}: holds a {self.stored['architecture']!r} {self.stored['kind']}, which this varpi does "
                "not know: update varpi"
            )
        fields = self.stored["config"]
        known = {field.name for field in dataclasses.fields(config_type)}
        if unknown := sorted(set(fields) - known):
            raise VarpiError(
                f"{self.where}: its configuration has fields that this varpi does not know: {few(unknown)}"
            )
        try:
            return config_type(**fields)
        except (VarpiError, TypeError) as error:
            raise VarpiError(f"{self.where}: its configuration is not valid: {error}") from error


def _open(source: Source, kind: str) -> _Opened:
    if isinstance(source, str) and source in EMBEDDED:
        source = embedded(source, kind)
    where = "state dict" if isinstance(source, Mapping) else os.fspath(source)
    checkpoint = read_checkpoint(source)
    stored = None
    if "varpi" in checkpoint.metadata:
        try:
            description = json.loads(checkpoint.metadata["varpi"])
            version = description["format"]
            stored = {name: description[name] for name in ("kind", "architecture", "config")}
            stored["config"] = dict(stored["config"])
        except (ValueError, KeyError, TypeError) as error:
            raise VarpiError(f"{where}: its metadata 'varpi' is not a description that varpi wrote") from error
        if version != FORMAT:
            raise VarpiError(f"{where}: has format {version}; this varpi reads format {FORMAT}: update varpi")
        if stored["kind"] != kind and stored["architecture"] not in families():
            raise VarpiError(f"{where}: holds a {stored['kind']}, not a {kind}")
    class_names = read_class_names(checkpoint.metadata, where)
    return _Opened(where, checkpoint.tensors, stored, checkpoint.config(), checkpoint.folder, class_names)


def _family(opened: _Opened, architecture: Any) -> Family | None:
    """The family of transformers' models that a source belongs to; None: LlamaGen and its tokenizers."""
    if opened.stored is not None:
        return families().get(opened.stored["architecture"])
    if isinstance(architecture, str) and (named := families().get(architecture.lower().partition("-")[0])):
        if architecture.lower() not in named.ARCHITECTURES:
            raise VarpiError(names.unknown(architecture, "generator", named.ARCHITECTURES))
        return named
    if architecture is None and opened.hf_config:
        family = family_of(opened.hf_config["model_type"])
        if family is None:
            raise VarpiError(
                f"{opened.where}: its config.json says model_type {opened.hf_config['model_type']!r}; varpi knows "
                f"{', '.join(families())}"
            )
        return family
    return None


def _pretrained(family: Family, opened: _Opened, architecture: Any, compat: Mapping[str, bool]) -> Pretrained:
    config = opened.stored["config"] if opened.stored is not None else opened.hf_config
    if not config and isinstance(architecture, str):
        config = family.config_for(architecture.lower()).to_dict()
    return Pretrained(opened.where, opened.tensors, config, opened.folder, dict(compat))


def _load_pretrained(
    family: Family,
    opened: _Opened,
    architecture: Any,
    image_size: int | None,
    device: torch.device | str,
    dtype: torch.dtype,
    compat: Mapping[str, bool],
) -> Generator:
    generator: Any
    generator, tensors = family.assemble(_pretrained(family, opened, architecture, compat))
    _check_image_size(opened.where, image_size, generator.grid)
    fill(generator, tensors, str, opened.where, "its configuration", device, dtype)
    generator.reset_tables()
    return generator.eval()


def _check_image_size(where: str, image_size: int | None, grid: int) -> None:
    if image_size is not None and image_size not in [factor * grid for factor in DOWNSAMPLES]:
        raise VarpiError(
            f"{where}: image_size is {image_size}, but the generator's grid is {grid}x{grid}: it makes images of "
            f"{' or '.join(str(factor * grid) for factor in DOWNSAMPLES)} pixels"
        )


def _grid(where: str, stored: LlamaGenConfig | None, image_size: int | None) -> int:
    if stored is not None:
        return stored.grid
    if image_size is None:
        raise VarpiError(f"{where}: does not tell for which image size it is; pass image_size (256, 384, 512, …)")
    if image_size < 16 or image_size % 16:
        raise VarpiError(f"{where}: image_size is {image_size}; it must be a multiple of 16, the tokenizer's patch")
    return image_size // 16


def _refuse_contradiction(where: str, one: str, facts: Mapping[str, Any], other: str, config: Any) -> None:
    differing = [field for field, value in facts.items() if value != getattr(config, field)]
    if differing:
        left = ", ".join(f"{field} {facts[field]}" for field in differing)
        right = ", ".join(f"{field} {getattr(config, field)}" for field in differing)
        raise VarpiError(f"{where}: {one} {left}, but {other} says {right}")


# -- out


def save_generator(
    generator: Generator,
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a generator as safetensors with its configuration inside; `extra` is further metadata.

    state_dict: the whole weights, when the generator holds only this process's shards.

    Raises:
        VarpiError: the file cannot be written, for instance for lack of space; an older one is left as it is.
    """
    _save(generator, path, state_dict, extra)


def save_tokenizer(
    tokenizer: Tokenizer,
    path: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a tokenizer, as `save_generator` does."""
    _save(tokenizer, path, state_dict, extra)


def to_original(model: Generator | Tokenizer) -> dict[str, Tensor]:
    """The weights on the CPU under the names of the released files (LlamaGen's, or transformers' for its models).

    Not copies where they are there already.
    """
    return _renamed(model, model.state_dict())  # pyright: ignore[reportAttributeAccessIssue]


def export_original(model: Generator | Tokenizer, path: str | os.PathLike[str]) -> None:
    """Write what the original code loads.

    LlamaGen and its tokenizers: a file, safetensors if `path` ends so, otherwise `torch.save`. A generator becomes a
    plain dictionary of tensors (LlamaGen's `--from-fsdp` form), a tokenizer {"model": tensors}. A transformers model: a
    directory for `from_pretrained`.

    Raises:
        VarpiError: the file cannot be written; an older one is left as it is.
    """
    tensors = to_original(model)
    if isinstance(model, PretrainedGenerator):
        Path(path).mkdir(parents=True, exist_ok=True)
        _write_side_files(model, Path(path))
        path = Path(path, "model.safetensors")
    if os.fspath(path).endswith(".safetensors"):
        metadata = {"format": "pt", **class_names_metadata(model)}
        write_aside(path, lambda aside: save_file(tensors, aside, metadata=metadata), size=_size(tensors))
    else:
        content = {"model": tensors} if isinstance(model, VQ) else tensors
        write_aside(path, lambda aside: torch.save(content, aside), size=_size(tensors))


_ARCHITECTURE = {LlamaGenConfig: "llamagen", VQConfig: "vq"}


def _describe(model: object) -> tuple[str, str, dict[str, Any]]:
    """Kind, architecture and configuration of a model whose weights have a file format."""
    if isinstance(model, LlamaGen | VQ):
        kind = "generator" if isinstance(model, LlamaGen) else "tokenizer"
        return kind, _ARCHITECTURE[type(model.config)], dataclasses.asdict(model.config)
    if isinstance(model, PretrainedGenerator) and (family := family_of(model.hf_config["model_type"])):
        return "generator", family.MODEL_TYPES[0], model.hf_config
    raise VarpiError(f"varpi has no file format for a {type(model).__name__}")


def _renamed(model: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights, adapters merged, under the names of its original files."""
    if isinstance(model, PretrainedGenerator):
        rename: Callable[[str], str | None] = model.name_in_file
    else:
        rename = names.original_name if isinstance(model, LlamaGen) else str
    tensors = _tensors(lora.merge(model, state_dict))
    return {new: tensor for name, tensor in tensors.items() if (new := rename(name)) is not None}


def _write_side_files(model: PretrainedGenerator, folder: Path) -> None:
    """config.json, and what else `from_pretrained` looks for."""
    write_text(folder / "config.json", json.dumps(model.hf_config, indent=2) + "\n")
    for name in SIDE_FILES[1:]:
        if model.folder is not None and (model.folder / name).is_file() and model.folder.resolve() != folder.resolve():
            shutil.copyfile(model.folder / name, folder / name)


def _tensors(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each dense in a storage of its own, as file formats want them."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    return {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in tensors.items()
    }


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _save(
    model: object,
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None,
    extra: Mapping[str, str] | None,
) -> None:
    kind, architecture, config = _describe(model)
    own = model.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    if state_dict is not None and set(state_dict) != set(own):
        raise VarpiError(f"{path}: not the tensors of this {kind}: {few(sorted(set(state_dict) ^ set(own)))}")
    state_dict = own if state_dict is None else state_dict
    if isinstance(model, PretrainedGenerator):
        tensors = _renamed(model, state_dict)
        _write_side_files(model, Path(path).parent)
    else:
        tensors = _tensors(lora.merge(model, state_dict))
    description = {"format": FORMAT, "kind": kind, "architecture": architecture, "config": config}
    metadata = {"format": "pt", **(extra or {}), **class_names_metadata(model), "varpi": json.dumps(description)}
    write_aside(path, lambda aside: save_file(tensors, aside, metadata=metadata), size=_size(tensors))
