"""Caption features on disk: one file per caption, written once, read in training instead of running the encoder."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from varpi.data.caption_check import Checked
from varpi.data.dataset import NO_FEATURES, BadImage, Captioned, Dropped, Item
from varpi.data.left_out import LeftOut
from varpi.data.text_encoder import TextEncoder
from varpi.errors import VarpiError
from varpi.runtime.files import clear_parts, line, read_json, write_aside, write_text
from varpi.runtime.numpy_files import read_npy
from varpi.runtime.parts import difference

Form = Literal["safetensors", "npy"]
"""safetensors: "features" bfloat16 (L, C), which loses nothing of an encoder that computes in bfloat16. npy: float32
(1, L, C), the files that LlamaGen's extraction writes and its training reads."""

_RECORD = "encoder.json"
_MOST_BYTES = 1 << 28  # far more than any caption has
# Where a dataset's first items have no features, the rest have none either: a wrong root, not some dropped captions.
_LOOKED_FOR = 1000


def write_features(path: Path, features: Tensor, form: Form, *, sync: bool = True) -> None:
    """Write one caption's features, float (L, C), to `path`, whose name must end in the form's suffix.

    sync: see `write_aside`.

    Raises:
        VarpiError: they are not features (see `read_features`), or cannot be written; `path` is as before.
    """
    if path.suffix != f".{form}":
        raise VarpiError(f"{path}: the name of a file of form {form!r} must end in .{form}")
    features = _checked(features.detach().cpu(), path)
    if form == "npy":
        # By the open file, because numpy would add a suffix to the name
        def write(aside: Path) -> None:
            with aside.open("wb") as file:
                np.save(file, features[None].numpy())
    else:

        def write(aside: Path) -> None:
            save_file({"features": features.bfloat16().contiguous()}, aside)

    write_aside(path, write, sync=sync)


def read_features(path: Path) -> Tensor:
    """The features of one caption, float32 (L, C), from a file of either form; npy may also hold (L, C).

    Raises:
        VarpiError: the file is absent or damaged, has another shape, or holds anything but L >= 1 rows of finite
            floats.
    """
    try:
        if path.suffix == ".npy":
            array = read_npy(path, _MOST_BYTES)
            features = torch.from_numpy(array[0] if array.ndim == 3 and len(array) == 1 else array)
        else:
            with safe_open(path, framework="pt") as file:
                features = file.get_tensor("features")
    except Exception as error:  # numpy's parser of a damaged header raises nearly anything
        raise VarpiError(f"{path}: not a readable file of caption features ({line(error)}); encode it again") from error
    return _checked(features, path)


def _of_another_split(record: Path, split: str) -> str | None:
    """The split that features are of, where their record says so and it is not this one."""
    if not record.is_file():  # made by LlamaGen's own extraction, say
        return None
    said = read_json(record)
    other = said.get("split") if isinstance(said, dict) else None
    return None if other in (None, split) else str(other)


def _checked(features: Tensor, path: Path) -> Tensor:
    """As float32 (L, C)."""
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise VarpiError(f"{path}: holds {features.dtype} {tuple(features.shape)}; caption features are float (L, C)")
    features = features.float()
    if not features.isfinite().all():
        raise VarpiError(f"{path}: the caption features hold values that are not finite")
    return features


class WithFeatures:
    """A captioned dataset whose conditions are features from files instead of the captions themselves.

    Args:
        dataset: the captions and images.
        root: directory of the files; those of an item lie at `root/key.safetensors` or else `root/key.npy`.
        split: which one the captions are of. Where `root/split` holds features, they are read there.

    Raises:
        VarpiError: none of the first 1000 items has features under `root`, or they are those of another split.
    """

    num_classes = None
    class_names = None

    def __init__(self, dataset: Captioned, root: str | Path, split: str | None = None) -> None:
        self._dataset = dataset
        self._root = Path(root).expanduser()
        if split is not None:
            if (self._root / split / _RECORD).is_file():
                self._root /= split
            if other := _of_another_split(self._root / _RECORD, split):
                raise VarpiError(
                    f"{root}: holds features of split {other!r}, not {split!r}; encode these into {self._root / split} "
                    f"(varpi encode captions … --split {split})"
                )
        looked_for = range(min(len(dataset), _LOOKED_FOR))
        if looked_for and not any(self._file(index) for index in looked_for):
            raise VarpiError(
                f"{root}: no caption features for any of the first {len(looked_for)} items (the first would be "
                f"{self._root / dataset.key(0)}.safetensors or .npy); run `varpi encode captions`, or name another root"
            )

    @property
    def fingerprint(self) -> str:
        """Tells captions from features, not one directory of features from another."""
        return hashlib.sha256(f"{self._dataset.fingerprint} with caption features".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Item:
        """The item at `index`; its condition is float32 (L, C).

        Raises:
            BadImage: the image or the file of features cannot be read.
            Dropped: it has no file of features, or the dataset leaves it out.
        """
        path = self._file(index)
        if path is None:
            where = self._root / self._dataset.key(index)
            raise Dropped(
                f"{self.name(index)}: no caption features at {where}.safetensors or .npy; run `varpi encode captions`",
                NO_FEATURES,
            )
        try:
            features = read_features(path)
        except VarpiError as error:  # one damaged file among millions is not the end of a run
            raise BadImage(str(error)) from error
        return Item(self._dataset[index].image, features)

    def caption(self, index: int) -> str:
        return self._dataset.caption(index)

    def name(self, index: int) -> str:
        return self._dataset.name(index)

    def key(self, index: int) -> str:
        return self._dataset.key(index)

    def _file(self, index: int) -> Path | None:
        stem = _below(self._root, self._dataset.key(index))
        candidates = (Path(f"{stem}.{form}") for form in get_args(Form))
        return next((path for path in candidates if path.is_file()), None)


class EncodeCounts(NamedTuple):
    """What became of the captions."""

    written: int
    kept: int
    """Features that were there already."""


def encode_captions(
    dataset: Captioned,
    encoder: TextEncoder,
    root: str | Path,
    *,
    form: Form = "safetensors",
    batch_size: int = 32,
    about: Mapping[str, Any] | None = None,
    rank: int = 0,
    world_size: int = 1,
    left_out: LeftOut | None = None,
    progress: bool = False,
) -> EncodeCounts:
    """Write the features of every caption of `dataset` to `root/key.form`; start again and it goes on.

    Files that are there and readable are kept, damaged ones written anew. `root/encoder.json` records what the
    features come from. Rounding depends on the company in a pass, and a pass is always of the captions of the rows
    [k b, (k + 1) b) for a batch size b: the files are the same bytes for any number of processes, and resumed or not.

    Args:
        form: of the files, see `Form`.
        batch_size: rows in one pass of the encoder; it becomes `encoder.batch_size`.
        about: what the captions are ("split", "caption_column"), for the record; captions of other ones, whose files
            would have the same names, are refused.
        rank: this process's number in [0, world_size); it encodes the passes k with k % world_size == rank.
        world_size: number of processes that share the work.
        left_out: where captions that cannot be used are counted.
        progress: show a bar on stderr.

    Raises:
        VarpiError: contradictory arguments, a root that cannot be written or holds the features of another encoder,
            number of tokens, form, or split, or features that are not finite.
    """
    root = Path(root).expanduser()
    if form not in get_args(Form):
        raise VarpiError(f"form is {form!r}; it must be one of {', '.join(get_args(Form))}")
    if batch_size < 1:
        raise VarpiError(f"batch_size is {batch_size}; it must be at least 1")
    if not 0 <= rank < world_size:
        raise VarpiError(f"rank is {rank}; it must be in [0, {world_size})")
    dataset, left_out = Checked(dataset, encoder.caption_check), LeftOut() if left_out is None else left_out
    ours = {"encoder": encoder.source, "width": encoder.width, "max_tokens": encoder.max_tokens, "form": form}
    ours |= about or {}
    record = root / _RECORD
    if other := difference(record, ours):
        raise VarpiError(f"{record}: {other}; choose another root")
    if rank == 0:
        clear_parts([record])
        write_text(record, json.dumps(ours, indent=2) + "\n")  # now, so that trouble with the root shows
    encoder.batch_size = batch_size
    written = kept = 0
    starts = range(0, len(dataset), batch_size)[rank::world_size]
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        for start in bar.track(starts, description="encoding captions"):
            captions: dict[Path, str] = {}
            missing: set[Path] = set()
            for index in range(start, min(start + batch_size, len(dataset))):
                path = Path(f"{_below(root, dataset.key(index))}.{form}")
                there = _is_kept(path, encoder.width)
                try:
                    captions[path] = dataset.caption(index)
                except Dropped as error:
                    left_out.note(error)
                    continue
                missing |= set() if there else {path}
                kept += there
            if missing:
                clear_parts(missing)
                for path, features in zip(captions, encoder([*captions.values()]), strict=True):
                    if path in missing:
                        write_features(path, features, form, sync=False)
                written += len(missing)
    os.sync()  # once for all files
    return EncodeCounts(written, kept)


def _is_kept(path: Path, width: int) -> bool:
    """Whether `path` holds features already."""
    if not path.is_file():
        return False
    try:
        found = read_features(path).shape[1]
    except VarpiError:
        return False
    if found != width:
        raise VarpiError(f"{path}: holds features of width {found}, the encoder's is {width}; choose another root")
    return True


def _below(root: Path, key: str) -> Path:
    """`root/key`. The key comes from names in downloaded files, and must not lead elsewhere."""
    if Path(key).is_absolute() or ".." in Path(key).parts:
        raise VarpiError(f"{key!r}: the name of an item must not lead out of the directory of its features")
    return root / key
