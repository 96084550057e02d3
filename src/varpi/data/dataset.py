"""What a dataset is: map-style access to (image, class), in an order that depends on the stored data alone."""

from typing import NamedTuple, Protocol

from torch import Tensor

from varpi.errors import VarpiError


class BadImage(VarpiError):
    """One item of a dataset that cannot be read; the message names it and says why."""


class Item(NamedTuple):
    """One example."""

    image: Tensor
    """float32 (3, S, S) in [-1, 1]."""
    condition: int
    """Class id in [0, num_classes)."""


class Dataset(Protocol):
    """Map-style access to (image, class). Instances are picklable, because worker processes hold copies."""

    @property
    def num_classes(self) -> int:
        """Number of classes; every condition is below it."""
        ...

    @property
    def class_names(self) -> list[str] | None:
        """A name for each class, or None where the source stores bare numbers."""
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
        """
        ...
