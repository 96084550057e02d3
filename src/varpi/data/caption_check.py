"""Captions that a generator cannot use, left out where data is loaded."""

from collections.abc import Callable
from typing import TypeGuard

from varpi.data.captions import clean_caption
from varpi.data.dataset import CAPTION_EMPTIED, Captioned, Dataset, Dropped, Item

CaptionCheck = Callable[[str, str], None]
"""Looks at a caption, and what to call its item; raises Dropped where it cannot be used. It can be pickled."""


def refuse_emptied(caption: str, name: str) -> None:
    """The check for a T5 encoder, which would be given the empty sentence."""
    if not clean_caption(clean_caption(caption)):
        raise Dropped(f"{name}: cleaning leaves nothing of the caption {caption!r:.60}", CAPTION_EMPTIED)


class Checked:
    """A captioned dataset whose items are `Dropped` where `check` refuses their captions."""

    num_classes = None
    class_names = None

    def __init__(self, dataset: Captioned, check: CaptionCheck) -> None:
        self._dataset = dataset
        self._check = check

    @property
    def fingerprint(self) -> str:
        return self._dataset.fingerprint

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Item:
        item = self._dataset[index]
        if isinstance(item.condition, str):
            self._check(item.condition, self.name(index))
        return item

    def caption(self, index: int) -> str:
        caption = self._dataset.caption(index)
        self._check(caption, self.name(index))
        return caption

    def name(self, index: int) -> str:
        return self._dataset.name(index)

    def key(self, index: int) -> str:
        return self._dataset.key(index)


def checked(dataset: Dataset, check: CaptionCheck | None) -> Dataset:
    """The dataset, `Checked` where it has captions and there is a check."""
    return Checked(dataset, check) if check is not None and is_captioned(dataset) else dataset


def is_captioned(dataset: Dataset) -> TypeGuard[Captioned]:
    return dataset.num_classes is None
