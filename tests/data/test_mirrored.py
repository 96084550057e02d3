import pytest
import torch

from varpi.data import open_dataset
from varpi.data.mirrored import Mirrored
from varpi.errors import VarpiError


def test_every_image_and_its_mirror_image() -> None:
    plain = open_dataset("digits", image_size=32)
    both = Mirrored(plain)
    assert len(both) == 7600
    assert (both.num_classes, both.class_names) == (plain.num_classes, plain.class_names)
    for index in (0, 17, 3799):
        assert torch.equal(both[index].image, plain[index].image)
        assert torch.equal(both[index + 3800].image[..., 3], plain[index].image[..., 28])
        assert both[index + 3800].condition == plain[index].condition
    assert both.fingerprint != plain.fingerprint


def test_captions_are_refused() -> None:
    with pytest.raises(VarpiError, match=r"data\.flip is for classes; captions may speak of left and right"):
        Mirrored(open_dataset("captioned-digits", image_size=32))
