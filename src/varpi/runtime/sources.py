"""Where weights come from: a file, a directory, the Hub, or the package itself."""

import importlib.resources
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from varpi.errors import VarpiError, printable
from varpi.runtime import hub
from varpi.runtime.files import line, read_json

Source = str | os.PathLike[str] | Mapping[str, Any]
"""A file, a directory, a Hub id ("org/name[@revision][:file]"), or a state dict."""

EMBEDDED = ("digits", "cifar10", "shapes")
ENDINGS = (".safetensors", ".pt", ".pth", ".bin")
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


def few(names: Iterable[object], most: int = 5) -> str:
    """The first of them on one line, separated by commas; names come from files, hold anything and end never."""
    names = list(names)
    shown = [f"{text[:200]}…" if len(text := printable(name)) > 200 else text for name in names[:most]]
    return ", ".join(shown) + (", …" if len(names) > most else "")


def find(source: str | os.PathLike[str]) -> Path:
    """The one file that `source` means: a weights file or the index of a sharded one."""
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        try:
            files = [entry.name for entry in path.iterdir() if os.path.isfile(entry)]
        except OSError as error:
            raise VarpiError(f"{source}: cannot be listed ({line(error)})") from error
        return path / _choose(files, f"{source}", f"{path}{os.sep}<file>")
    if os.path.isfile(path):
        if path.suffix not in ENDINGS and not path.name.endswith(".index.json"):
            raise VarpiError(f"{source}: not a checkpoint file; the name must end in one of {', '.join(ENDINGS)}")
        return path
    if os.path.lexists(path):
        raise VarpiError(f"{source}: is a pipe, a device or a broken link; expected a checkpoint file or a directory")
    match = hub.ID.fullmatch(os.fspath(source))
    if match and Path(match["repo"]).suffix not in ENDINGS:
        return _download(match["repo"], match["revision"], match["file"])
    raise VarpiError(
        f"{os.fspath(source)[:300]}: no such file or directory, and neither a Hub id (org/name[@revision][:file]) nor "
        f"embedded ({', '.join(EMBEDDED)})"
    )


def is_here(source: Source) -> bool:
    """Whether a source needs no download; its files may still be damaged."""
    return isinstance(source, Mapping) or source in EMBEDDED or os.path.lexists(os.path.expanduser(source))


def embedded(name: str, kind: str) -> Path:
    """Weights in the package: a pair's "generator" or "tokenizer"; of some also "perceptual", "judge" or "detector"."""
    path = Path(str(importlib.resources.files("varpi.embedded") / f"{name}-{kind}.safetensors"))
    if not path.is_file():
        raise VarpiError(f"{path}: this varpi has no embedded {kind} {name!r}; give a checkpoint of your own")
    return path


def _choose(files: Iterable[str], where: str, how: str) -> str:
    """Among the names in a directory, the file to load."""
    files = sorted(files)
    for preferred in ("model.safetensors", "consolidated.pth"):
        if preferred in files:
            return preferred
    for endings in ((".safetensors.index.json",), (".bin.index.json",), ENDINGS):
        candidates = [name for name in files if name.endswith(endings)]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise VarpiError(f"{where}: holds {len(candidates)} checkpoints ({few(candidates)}); name one: {how}")
    raise VarpiError(f"{where}: holds no checkpoint (*{', *'.join(ENDINGS)})")


def _download(repo: str, revision: str | None, file: str | None) -> Path:
    """The weights file of a Hub repository, with what belongs to it beside it."""
    repository = hub.Repository(repo, revision)
    top = [name for name in repository.names if "/" not in name]
    chosen = file or _choose(top, repository.where, f"{repository.where}:<file>")
    wanted = [chosen, *(name for name in SIDE_FILES if name in top)]
    folder = repository.download(wanted)
    if chosen.endswith(".index.json"):
        repository.download([str(Path(chosen).parent / name) for name in shards_of(folder / chosen)])
    return folder / chosen


def shards_of(index: Path) -> dict[str, list[str]]:
    """The tensors that the index of a sharded checkpoint lists, by the name of their file."""
    try:
        listed = read_json(index)["weight_map"].items()
    except (KeyError, AttributeError, TypeError) as error:
        raise VarpiError(f"{index}: not a readable index of a sharded checkpoint ({line(error)})") from error
    shards: dict[str, list[str]] = {}
    for tensor, name in listed:
        if not isinstance(name, str) or Path(name).name != name:
            raise VarpiError(f"{index}: lists {name!r:.80}, which is not the name of a file beside it")
        shards.setdefault(name, []).append(tensor)
    return shards
