"""Images on disk in one folder per class, as ImageNet is usually unpacked."""

import hashlib
import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import make_dataset

from varpi.data.dataset import Item
from varpi.data.images import SUFFIXES, has_image_suffix
from varpi.data.transforms import load_image
from varpi.errors import VarpiError

SPLITS = {"train": ["train"], "validation": ["validation", "val", "valid"], "test": ["test"]}
_SIZES_IN_FINGERPRINT = 1000


class ImageFolder:
    """`root/class_name/**/image.jpg`; class ids follow the sorted folder names, as in torchvision.

    `root` may also hold one such tree per split (`root/train/class_name/…`, `root/val/…`). Names that begin with a dot
    are ignored.

    Raises:
        VarpiError: no class folders, no images in them, or no such split.
    """

    def __init__(self, root: Path, *, split: str = "train", image_size: int) -> None:
        self._root = _split_root(root, split)
        self._image_size = image_size
        self.class_names = folders(self._root)
        if not self.class_names:
            raise VarpiError(f"{self._root}: no class folders; expected {self._root}/CLASS_NAME/IMAGE.jpg")
        ids = {name: number for number, name in enumerate(self.class_names)}
        samples = make_dataset(str(self._root), ids, is_valid_file=is_image, allow_empty=True)
        if not samples:
            raise VarpiError(f"{self._root}: no images in its class folders; known are {' '.join(SUFFIXES)}")
        # One array each: worker processes share its pages, which a list of a million tuples would not allow
        self._paths = np.array([os.fsencode(os.path.relpath(path, self._root)) for path, _ in samples])
        self._labels = np.array([label for _, label in samples], dtype=np.int64)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Every name; the file sizes of at most a thousand, since a million `stat` calls take minutes on a network."""
        digest = hashlib.sha256(b"\0".join(self._paths))
        for index in np.linspace(0, len(self) - 1, min(len(self), _SIZES_IN_FINGERPRINT)).astype(int):
            path = self._path(index)
            digest.update(str(path.stat().st_size if path.exists() else -1).encode() + b"\0")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Item:
        path = self._path(index)
        return Item(load_image(path, str(path), self._image_size), int(self._labels[index]))

    def _path(self, index: int) -> Path:
        return self._root / os.fsdecode(bytes(self._paths[index]))


def _split_root(root: Path, split: str) -> Path:
    """The tree of `split` below `root`, or `root` itself when it holds no splits and "train" is asked for."""
    # A class may be called "train" as well (COCO has one); a split holds folders where a class holds images.
    split_names = {name for names in SPLITS.values() for name in names} | {split}
    present = [name for name in folders(root) if name in split_names and folders(root / name)]
    for name in SPLITS.get(split, [split]):
        if name in present:
            return root / name
    if present:
        raise VarpiError(f"{root}: no split {split!r}; it has {', '.join(present)}")
    if split != "train":
        raise VarpiError(
            f"{root}: no split {split!r}; a single tree of class folders is split 'train' "
            f"(give {root}/{split}/CLASS_NAME/…, or name the other tree)"
        )
    return root


def folders(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise VarpiError(f"{directory}: cannot be listed ({error.strerror})") from error


def is_image(path: str) -> bool:
    return has_image_suffix(path) and not os.path.basename(path).startswith(".")
