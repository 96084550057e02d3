"""Images on disk in one folder per class, as ImageNet is usually unpacked."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from varpi.data.classes import number_classes
from varpi.data.dataset import Item
from varpi.data.images import SUFFIXES
from varpi.data.left_out import LeftOut
from varpi.data.listing import directories, list_images
from varpi.data.transforms import load_image
from varpi.errors import VarpiError

SPLITS = {"train": ["train"], "validation": ["validation", "val", "valid"], "test": ["test"]}
_SIZES_IN_FINGERPRINT = 1000


class ImageFolder:
    """`root/class_name/**/image.jpg`; class ids as in `number_classes`, by the names of the folders.

    `root` may also hold one such tree per split (`root/train/class_name/…`, `root/val/…`). Names that begin with a dot
    are ignored; what else is no image is counted and said.

    Args:
        classes: the names of all classes in the order of their ids, where they are known.

    Raises:
        VarpiError: no class folders, no images in them, no such split, or a folder that is none of `classes`.
    """

    def __init__(
        self, root: Path, *, split: str = "train", image_size: int, classes: Sequence[str] | None = None
    ) -> None:
        self._root = _split_root(root, split)
        self._image_size = image_size
        names = directories(self._root)
        if not names:
            raise VarpiError(f"{self._root}: no class folders; expected {self._root}/CLASS_NAME/IMAGE.jpg")
        self._ids, self.class_names = number_classes(names, classes, str(self._root))
        left_out = LeftOut()
        above = [self._root, *self._root.resolve().parents]  # where a link may lead back to
        files = [list_images(self._root / name, left_out, seen=above) for name in names]
        # One array each: worker processes share its pages, which a list of a million tuples would not allow
        self._paths = np.array([os.fsencode(os.path.relpath(path, self._root)) for paths in files for path in paths])
        self._labels = np.repeat(np.array(self._ids, dtype=np.int64), [len(paths) for paths in files])
        left_out.say(str(self._root), len(self) + len(left_out), "files")
        if len(self) == 0:
            raise VarpiError(f"{self._root}: no images in its class folders; known are {' '.join(SUFFIXES)}")

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """Every name; the file sizes of at most a thousand, since a million `stat` calls take minutes on a network."""
        digest = hashlib.sha256(b"\0".join(self._paths))
        if self._ids != tuple(range(len(self._ids))):
            digest.update(self._labels.tobytes())
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


def check_tree(root: Path, split: str) -> None:
    """Raise VarpiError where `ImageFolder` would find no class folders with an image, looking no further than one."""
    tree = _split_root(root, split)
    found = (path for name in directories(tree) for path in (tree / name).rglob("*"))
    if not any(path.suffix.lower() in SUFFIXES for path in found):
        raise VarpiError(f"{tree}: no class folders with images; expected {tree}/CLASS_NAME/IMAGE.jpg")


def _split_root(root: Path, split: str) -> Path:
    """The tree of `split` below `root`, or `root` itself when it holds no splits and "train" is asked for."""
    # A class may be called "train" as well (COCO has one); a split holds folders where a class holds images.
    split_names = {name for names in SPLITS.values() for name in names} | {split}
    present = [name for name in directories(root) if name in split_names and directories(root / name)]
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
