"""The files of a checkpoint: sealed when they are written, and read without trusting them.

torch.distributed.checkpoint keeps its index (`.metadata`) and every value that is no tensor as pickles, and unpickles
them as they are. A run directory may come from a stranger, so here the index is read by an unpickler that knows the
classes an index is made of and nothing else, and all else by torch's `weights_only` one.
"""

import hashlib
import io
import json
import os
import pickle
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from varpi.errors import VarpiError
from varpi.runtime.files import line, write_text

INDEX = ".metadata"
PROGRESS = "trainer.json"
MANIFEST = "manifest.json"

_INDEX_CLASSES = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # a look-up by name
    ("torch", "Size"): torch.Size,
    **{("torch", repr(kind)[6:]): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)},
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _INDEX_CLASSES[module_name, global_name]
        except KeyError:
            raise VarpiError(f"names {module_name}.{global_name}, which no index of a checkpoint needs") from None


class CheckpointReader(FileSystemReader):
    """torch's reader of a directory, with an index that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = read_index(Path(self.path))
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


class CheckpointPlanner(DefaultLoadPlanner):
    """torch's planner, for which a value that is no tensor may only be plain: numbers, strings, and what holds them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint.

    Raises:
        VarpiError: it is damaged, names what no index needs, or points outside the checkpoint.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        names = {place.relative_path for place in index.storage_data.values()}
        packed = any(place.transform_descriptors for place in index.storage_data.values())
    except VarpiError as error:
        raise VarpiError(f"{path}: {error}; it is not one that varpi wrote, and was not read") from None
    except Exception as error:  # whatever a damaged pickle may raise
        raise VarpiError(f"{path}: not a readable index ({line(error)})") from error
    if not isinstance(index, Metadata) or packed or not names <= read_manifest(folder).keys():
        raise VarpiError(f"{path}: is not the index of this checkpoint")
    return index


def seal(folder: Path) -> None:
    """Flush every file to disk and record its size and digest."""
    manifest = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    write_text(folder / MANIFEST, json.dumps(manifest))
    sync(folder)


def sync(folder: Path) -> None:
    """Flush a directory: what it holds, and under which names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of each file by name; raises VarpiError when there is none that can be read."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        wellformed = {INDEX, PROGRESS} <= manifest.keys() and all(
            Path(name).name == name and set(entry) == {"bytes", "sha256"} for name, entry in manifest.items()
        )
    except Exception as error:
        raise VarpiError(f"{folder} is not a whole checkpoint ({path.name}: {line(error)})") from error
    if not wellformed:
        raise VarpiError(f"{folder} is not a whole checkpoint ({path.name}: not a list of its files)")
    return manifest


def verify(folder: Path, name: str) -> None:
    """Raise VarpiError unless a file of a checkpoint is what was written."""
    path, entry = folder / name, read_manifest(folder).get(name)
    if entry is None:
        raise VarpiError(f"{folder} is not a whole checkpoint ({MANIFEST} lacks {name})")
    try:
        status = path.lstat()
        whole = stat.S_ISREG(status.st_mode) and status.st_size == entry["bytes"]
        if whole:
            with path.open("rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
    except OSError as error:
        raise VarpiError(f"{folder} is not a whole checkpoint ({line(error)})") from error
    if not whole:
        raise VarpiError(f"{path} is damaged: its contents are not what was written")
