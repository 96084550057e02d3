"""What a dataset is: map-style access to (image, condition), in an order that depends on the stored data alone."""

from typing import NamedTuple, Protocol

from torch import Tensor

from varpi.errors import VarpiError

UNREADABLE = "unreadable"
TOO_SMALL = "too small"
NO_CAPTION = "without a usable caption"
NO_FEATURES = "without caption features"
NO_IMAGE = "without an image"
CAPTION_EMPTIED = "with a caption of which cleaning leaves nothing"
CAPTION_TOO_LONG = "with a caption too long for the generator"


class BadImage(VarpiError):
    """One item of a dataset that cannot be read; the message names it and says why."""

    reason = UNREADABLE


class Dropped(VarpiError):
    """One item of a dataset that is left out on purpose; the message names it and says why.

    reason: under what it is counted.
    """

    def __init__(self, message: str, reason: str = "not to be used") -> None:
        super().__init__(message)
        self.reason = reason


class Item(NamedTuple):
    """One example."""

    image: Tensor
    """float32 (3, S, S) in [-1, 1]."""
    condition: int | str | Tensor
    """Class id in [0, num_classes), a caption, or the caption's features: float (L, C), valid tokens only."""


class Dataset(Protocol):
    """Map-style access to (image, condition). Instances are picklable, because worker processes hold copies."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, and every condition is below it; None where the images have captions."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """A name for each class, in the order of the ids, or None where the source stores bare numbers or captions."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of names, count and sizes: it changes when the data does, without reading any pixels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """The item at `index`, in [0, len).

        Raises:
            BadImage: the image cannot be read or decoded.
            Dropped: the item is none to train on; captioned data only.
        """
        ...


class Captioned(Dataset, Protocol):
    """A dataset whose conditions are captions."""

    def caption(self, index: int) -> str:
        """The caption of the item at `index`, read without its image.

        Raises:
            Dropped: it has none that can be used.
        """
        ...

    def name(self, index: int) -> str:
        """What a message calls the item at `index`: its file, and its place in it."""
        ...

    def key(self, index: int) -> str:
        """Where the features of the item's caption lie below a features root, without a suffix: "00012/000120003"."""
        ...
