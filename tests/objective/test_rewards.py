"""The reward by hand, and what it must not compute, hold or repeat."""

import pytest
import torch
from torch import Tensor

from varpi.errors import VarpiError
from varpi.networks.convnet import SmallConvNet
from varpi.networks.perceptual import ConvPerceptual
from varpi.objective import RewardWeights, score_codes, score_samples


class MeanColor:
    """A perceptual distance simple enough to work by hand; counts the images it looks at."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def maps(self, images: Tensor) -> list[Tensor]:
        self.seen.append(images)
        return [images.mean(dim=(2, 3), keepdim=True)]

    def distance(self, maps: list[Tensor], reference: list[Tensor]) -> Tensor:
        (left,), (right,) = maps, reference
        right = right.repeat_interleave(left.shape[0] // right.shape[0], dim=0)
        return (left - right).abs().sum(dim=(1, 2, 3))


class Decoder:
    """Token t becomes the gray value t / 10; remembers how many sequences came at once."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.batches.append(tokens.shape[0])
        return (tokens / 10).reshape(-1, 1, 2, 2).expand(-1, 3, 2, 2)


def test_parts_by_hand():
    # Against a black image (all 0) and G = 2 samples of four pixels.
    samples = torch.tensor([[[1, 1, 1, 1], [0, 0, 0, 20]]])
    images = torch.zeros(1, 3, 2, 2)
    rewards = score_samples(Decoder(), samples, images, RewardWeights(2.0, 0.5, 1.0), perceptual=MeanColor())
    assert rewards.parts["mse"].tolist() == [pytest.approx([0.01, 1.0])]  # not clamped: (20/10)² / 4
    assert rewards.parts["l1"].tolist() == [pytest.approx([0.1, 0.5])]
    assert rewards.parts["perceptual"].tolist() == [pytest.approx([0.3, 1.5])]
    assert rewards.total.tolist() == [pytest.approx([-(0.02 + 0.15 + 0.1), -(2.0 + 0.75 + 0.5)])]
    assert rewards.total.dtype == torch.float32


def test_errors_of_both_signs_add_up():
    samples, images = torch.tensor([[[0, 2, 0, 2]]]), torch.full((1, 3, 2, 2), 0.1)
    rewards = score_samples(Decoder(), samples, images, RewardWeights(1.0, 0.0, 1.0))
    assert rewards.parts["l1"].item() == pytest.approx(0.1)
    assert rewards.parts["mse"].item() == pytest.approx(0.01)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 8, 11, 100])
def test_chunks_change_nothing_but_the_decode_batch(chunk: int):
    batch, group_size = 5, 4
    samples = torch.randint(20, (batch, group_size, 4))
    images = torch.randn(batch, 3, 2, 2)
    weights = RewardWeights(1.0, 1.0, 1.0)
    whole = score_samples(Decoder(), samples, images, weights, perceptual=MeanColor(), chunk=batch * group_size)

    decoder, perceptual = Decoder(), MeanColor()
    rewards = score_samples(decoder, samples, images, weights, perceptual=perceptual, chunk=chunk)
    assert torch.allclose(rewards.total, whole.total, atol=1e-6)
    for name, part in whole.parts.items():
        assert torch.allclose(rewards.parts[name], part, atol=1e-6)
    assert max(decoder.batches) <= chunk
    assert sum(decoder.batches) == batch * group_size
    # Each target once, each decoded sample once.
    seen = torch.cat(perceptual.seen)
    assert seen.shape[0] == batch + batch * group_size
    assert [int((seen == image).all(dim=(1, 2, 3)).sum()) for image in images] == [1] * batch


def test_distances_of_weight_zero_are_not_computed():
    perceptual = MeanColor()
    samples, images = torch.randint(20, (2, 3, 4)), torch.randn(2, 3, 2, 2)
    rewards = score_samples(Decoder(), samples, images, RewardWeights(1.0, 0.0), perceptual=perceptual)
    assert perceptual.seen == []
    assert list(rewards.parts) == ["mse"]
    assert torch.equal(rewards.total, -rewards.parts["mse"])
    alone = score_samples(Decoder(), samples, images, RewardWeights(0.0, 0.0, 1.0), perceptual=None)
    assert list(alone.parts) == ["l1"]


def test_each_sample_meets_its_own_image():
    images = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    samples = torch.tensor([1, 2, 3]).reshape(3, 1, 1).expand(3, 2, 4)
    rewards = score_samples(Decoder(), samples, images, RewardWeights(), perceptual=MeanColor(), chunk=4)
    assert rewards.total.abs().max() < 1e-6


def test_networks_and_decoders_get_no_gradient():
    scale = torch.ones((), requires_grad=True)
    perceptual = ConvPerceptual(SmallConvNet((8,), 2))
    images = torch.randn(1, 3, 4, 4)
    rewards = score_samples(
        lambda tokens: scale * torch.ones(tokens.shape[0], 3, 4, 4),
        torch.zeros(1, 2, 4, dtype=torch.int64),
        images,
        RewardWeights(),
        perceptual=perceptual,
    )
    assert not rewards.total.requires_grad


@pytest.mark.parametrize("name", ["mse", "perceptual", "l1"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(name: str, value: float):
    with pytest.raises(VarpiError, match=f"reward weight {name} is {value}"):
        RewardWeights(**{name: value})


def test_contradictions_are_refused():
    samples, images = torch.zeros(1, 2, 4, dtype=torch.int64), torch.zeros(1, 3, 2, 2)
    with pytest.raises(VarpiError, match="every reward weight is 0"):
        RewardWeights(0.0, 0.0, 0.0)
    with pytest.raises(VarpiError, match="no perceptual distance was given"):
        score_samples(Decoder(), samples, images, RewardWeights())
    with pytest.raises(VarpiError, match="chunk is 0"):
        score_samples(Decoder(), samples, images, RewardWeights(1.0, 0.0), chunk=0)
    with pytest.raises(VarpiError, match=r"\(3, 2, 2\) but the targets are \(3, 4, 4\)"):
        score_samples(Decoder(), samples, torch.zeros(1, 3, 4, 4), RewardWeights(1.0, 0.0))
    with pytest.raises(VarpiError, match="samples of 1 images, but 2 images"):
        score_samples(Decoder(), samples, torch.zeros(2, 3, 2, 2), RewardWeights(1.0, 0.0))


def test_maps_by_hand():
    # Token t decodes to the gray value t / 10 at its own pixel; black target; mse 2, l1 1.
    samples = torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 20]]])
    rewards = score_samples(Decoder(), samples, torch.zeros(1, 3, 2, 2), RewardWeights(2.0, 0.0, 1.0), local=True)
    assert rewards.maps is not None
    expected = torch.tensor([[[-(2 * 0.01 + 0.1), 0, 0, 0], [0, 0, 0, -(2 * 4.0 + 2.0)]]])
    torch.testing.assert_close(rewards.maps, expected)
    torch.testing.assert_close(rewards.maps.mean(dim=2), rewards.total)


def test_maps_add_up_to_the_reward_with_a_perceptual_distance():
    torch.manual_seed(0)
    perceptual = ConvPerceptual(SmallConvNet((8, 8, 8)))
    samples, images = torch.randint(20, (2, 3, 16)), torch.randn(2, 3, 8, 8)

    def decode(tokens: Tensor) -> Tensor:
        gray = (tokens / 10).view(-1, 1, 4, 4).expand(-1, 3, 4, 4)
        return gray.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    weights = RewardWeights(1.0, 1.0, 0.5)
    plain = score_samples(decode, samples, images, weights, perceptual=perceptual)
    assert plain.maps is None
    for chunk in (1, 2, 6):
        found = score_samples(decode, samples, images, weights, perceptual=perceptual, chunk=chunk, local=True)
        assert found.maps is not None
        torch.testing.assert_close(found.total, plain.total)
        # Layers of 8, 4 and 2 places a side meet a grid of 4: their means are kept
        torch.testing.assert_close(found.maps.mean(dim=2), found.total)


def test_codes_have_the_rewards_of_their_tokens_and_finite_difference_gradients():
    torch.manual_seed(1)
    perceptual = ConvPerceptual(SmallConvNet((8, 8)))
    weights, images = RewardWeights(1.0, 1.0, 0.5), torch.randn(2, 3, 8, 8)
    codes = torch.randn(2, 3, 3, 4, 4)

    def decode(piece: Tensor) -> Tensor:
        return piece.tanh().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    whole, gradients = score_codes(decode, codes, images, weights, perceptual=perceptual, chunk=6)
    for chunk in (1, 2, 4):
        found, others = score_codes(decode, codes, images, weights, perceptual=perceptual, chunk=chunk)
        torch.testing.assert_close(found.total, whole.total)
        torch.testing.assert_close(others, gradients)
    nudged = codes.clone()
    nudged[1, 2, 0, 3, 1] += 1e-2  # place 13 of its grid
    other, _ = score_codes(decode, nudged, images, weights, perceptual=perceptual)
    change = other.total - whole.total
    assert change[1, 2].item() == pytest.approx(-1e-2 * gradients[1, 2, 13, 0].item(), rel=0.2)
    change[1, 2] = 0
    assert change.abs().max() < 1e-6


# -- the energy score


def test_the_energy_score_by_hand():
    """Three gray samples 0.3, 0.1, 0 of a black image: roots of squared errors are plain differences."""
    samples = torch.tensor([[[3] * 4, [1] * 4, [0] * 4]])
    rewards = score_samples(Decoder(), samples, torch.zeros(1, 3, 2, 2), RewardWeights(1.0, 0.0), energy=True)
    assert rewards.parts["spread"].tolist() == [pytest.approx([(0.2 + 0.3) / 2, (0.2 + 0.1) / 2, (0.3 + 0.1) / 2])]
    assert rewards.total.tolist() == [pytest.approx([-0.3 + 0.25, -0.1 + 0.15, 0.2])]
    assert rewards.parts["mse"].tolist() == [pytest.approx([0.09, 0.01, 0.0])]


def test_the_energy_score_weighs_its_distances():
    """Two samples of either image; 4 x the squared error and 2 x the perceptual distance, below one root."""
    samples, images = torch.tensor([[[3] * 4, [1] * 4], [[0] * 4, [2] * 4]]), torch.zeros(2, 3, 2, 2)
    rewards = score_samples(
        Decoder(), samples, images, RewardWeights(4.0, 2.0), perceptual=MeanColor(), chunk=2, energy=True
    )

    def root(gap: float) -> float:
        return (4 * gap**2 + 2 * 3 * gap) ** 0.5

    expected = [[root(0.2) - root(0.3), root(0.2) - root(0.1)], [root(0.2), 0.0]]
    assert rewards.total.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]


def test_the_energy_score_prefers_the_truth_where_a_distance_prefers_the_mean():
    """An image is black or white, each as often: gray at 0.5 has the least distance, the fair coin the best score."""
    white = 10
    images = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 3, 2, 2)
    coin = torch.tensor([0, white] * 32).reshape(1, 64, 1).expand(2, 64, 4)
    gray = torch.full((2, 64, 4), white // 2)
    for energy, best in ((False, "gray"), (True, "coin")):
        found = {
            name: score_samples(Decoder(), samples, images, RewardWeights(1.0, 0.0), chunk=64, energy=energy)
            for name, samples in (("coin", coin), ("gray", gray))
        }
        # Each reward has the whole distance to another sample, the score of a distribution half of it.
        score = {name: (r.total - (r.parts["spread"] / 2 if energy else 0)).mean().item() for name, r in found.items()}
        assert max(score, key=lambda name: score[name]) == best


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_gradients_of_the_energy_score(group_size: int):
    """Those of the plain formula, which has each pair once, by autograd of all samples together."""
    draws = torch.Generator().manual_seed(0)
    codes = torch.rand(2, group_size, 3, 2, 2, generator=draws)
    images = torch.rand(2, 3, 2, 2, generator=draws)

    def decode(piece: Tensor) -> Tensor:
        return torch.sin(3 * piece)

    weights = RewardWeights(1.5, 0.5)
    rewards, gradients = score_codes(decode, codes, images, weights, perceptual=MeanColor(), chunk=4, energy=True)
    given = codes.clone().requires_grad_()
    seen = decode(given.flatten(0, 1)).unflatten(0, (2, group_size))

    def root(a: Tensor, b: Tensor) -> Tensor:
        colour = (a.mean(dim=(1, 2)) - b.mean(dim=(1, 2))).abs().sum()
        return (1.5 * (a - b).square().mean() + 0.5 * colour).sqrt()

    total = torch.zeros(())
    for b in range(2):
        for i in range(group_size):
            total = total + root(seen[b, i], images[b])
            for j in range(i):
                total = total - root(seen[b, i], seen[b, j]) / (group_size - 1)
    (expected,) = torch.autograd.grad(total, given)
    torch.testing.assert_close(gradients, expected.flatten(3).transpose(2, 3), atol=1e-6, rtol=1e-4)
    others = [root(seen[0, 0], seen[0, j]) for j in range(1, group_size)]
    by_hand = sum(others) / len(others) - root(seen[0, 0], images[0])
    assert rewards.total[0, 0].item() == pytest.approx(float(by_hand.detach()), abs=1e-6)


def test_equal_samples_have_finite_gradients():
    codes = torch.full((1, 2, 3, 2, 2), 0.5)
    _, gradients = score_codes(lambda c: c, codes, torch.full((1, 3, 2, 2), 0.5), RewardWeights(1.0, 0.0), energy=True)
    assert gradients.abs().max() == 0


@pytest.mark.parametrize(("group_size", "chunk"), [(1, 8), (4, 2)])
def test_an_energy_score_without_its_group(group_size: int, chunk: int):
    samples = torch.zeros(1, group_size, 4, dtype=torch.int64)
    with pytest.raises(VarpiError, match=f"{group_size} must be at least 2 and at most the chunk, {chunk}"):
        score_samples(Decoder(), samples, torch.zeros(1, 3, 2, 2), RewardWeights(1.0, 0.0), chunk=chunk, energy=True)
