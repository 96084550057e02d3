"""The small classifier."""

import pytest
import torch

from varpi.errors import VarpiError
from varpi.networks.convnet import SmallConvNet


def test_shapes_and_consistency():
    network = SmallConvNet((8, 16, 24), num_classes=5)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert [tuple(f.shape) for f in network.maps(images)] == [(2, 8, 32, 32), (2, 16, 16, 16), (2, 24, 8, 8)]
    assert all(f.min() >= 0 for f in network.maps(images))
    embedding = network.embedding(images)
    assert torch.allclose(embedding, network.maps(images)[-1].mean(dim=(2, 3)))
    assert torch.equal(network.head(embedding), network.logits(images))
    assert torch.equal(network(images), network.logits(images))
    assert network.logits(images).shape == (2, 5)


def test_a_residual_stage_adds_its_second_convolution_to_its_first():
    plain, residual = SmallConvNet((8, 16), num_classes=5), SmallConvNet((8, 16), num_classes=5, residual=True)
    residual.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 16, 16)
    first = plain.stages[0][:3](images)
    torch.testing.assert_close(residual.maps(images)[0], first + plain.stages[0](images))


def test_an_image_does_not_depend_on_its_batch_or_the_mode():
    network = SmallConvNet((8, 16), num_classes=5).train()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    whole = network(images)
    assert torch.allclose(network.eval()(images[1:2]), whole[1:2], atol=1e-6)


def test_it_learns():
    """Left-bright against right-bright images, from scratch in a few steps."""
    network = SmallConvNet((8, 16), num_classes=2)
    labels = torch.arange(32) % 2
    images = torch.rand(32, 3, 16, 16) * 0.5
    images[labels == 0, :, :, :8] += 0.5
    images[labels == 1, :, 8:, :] -= 0.5
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (network(images).argmax(1) == labels).float().mean() == 1.0


@pytest.mark.parametrize("channels", [(), (12,), (8, 0)])
def test_bad_widths_are_refused(channels: tuple[int, ...]):
    with pytest.raises(VarpiError, match="must be a multiple of 8"):
        SmallConvNet(channels)
