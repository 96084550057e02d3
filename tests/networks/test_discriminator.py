import pytest
import torch
from torch import nn

from varpi.networks.discriminator import PatchDiscriminator


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_how_far_a_patch_sees(layers: int, patch: int) -> None:
    """By the gradient of one logit; without the norms, which see the whole image."""
    network = PatchDiscriminator(8, layers)
    for i, block in enumerate(network.blocks):
        if isinstance(block, nn.GroupNorm):
            network.blocks[i] = nn.Identity()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = network(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert image.grad is not None
    seen = image.grad.abs().sum(dim=(0, 1)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == patch


def test_the_verdict_on_an_image_is_its_own() -> None:
    network = PatchDiscriminator(8, 2)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    logits = network(images)
    assert logits.shape == (3, 1, 6, 6)
    torch.testing.assert_close(network(images[1:2]), logits[1:2])
