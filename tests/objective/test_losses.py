"""Losses against numbers worked by hand and against plain autograd."""

import math

import pytest
import torch
from torch.nn import functional as F

from varpi.errors import VarpiError
from varpi.objective import entropy, kl_prior, losses, policy_loss, prior_loss, token_log_probs


def reference_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, tokens.transpose(1, 2)).transpose(1, 2)


@pytest.fixture(params=[1 << 24, 1], ids=["one slice", "a slice per image"])
def _slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_TEMPORARY_ELEMENTS", request.param)


@pytest.mark.usefixtures("_slices")
def test_token_log_probs_and_gradient_equal_log_softmax_and_gather():
    ours, theirs = (torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(2)) * 4 for _ in range(2))
    ours.requires_grad_(), theirs.requires_grad_()
    tokens = torch.randint(11, (3, 4, 5))
    tokens[:, 1] = tokens[:, 0]  # repeated tokens: their gradients add up
    weights = torch.randn(3, 4, 5)

    ours_value, theirs_value = token_log_probs(ours, tokens), reference_log_probs(theirs, tokens)
    assert ours_value.dtype == torch.float32
    assert torch.allclose(ours_value, theirs_value, atol=1e-6)
    (ours_value * weights).sum().backward()
    (theirs_value * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


@pytest.mark.usefixtures("_slices")
def test_token_log_probs_gradcheck():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (2, 4, 3))
    tokens[:, 1] = tokens[:, 0]
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, tokens), (logits,))


def test_token_log_probs_of_bfloat16_logits_are_float32_of_the_same_numbers():
    logits = (torch.randn(2, 3, 50) * 5).bfloat16().requires_grad_()
    exact = logits.detach().float().requires_grad_()
    tokens = torch.randint(50, (2, 4, 3))
    values = token_log_probs(logits, tokens)
    assert values.dtype == torch.float32
    assert torch.allclose(values, reference_log_probs(exact, tokens), atol=1e-5)
    values.sum().backward()
    reference_log_probs(exact, tokens).sum().backward()
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    # Accumulated in float32 and rounded once.
    assert torch.allclose(logits.grad.float(), exact.grad, rtol=2**-8, atol=1e-6)


def test_token_log_probs_saves_no_second_copy_of_the_logits():
    logits = torch.randn(2, 3, 50, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        token_log_probs(logits, torch.zeros(2, 4, 3, dtype=torch.int64))
    large = [tensor for tensor in saved if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


def test_token_log_probs_refuses_other_shapes():
    with pytest.raises(VarpiError, match=r"\(2, 4, 7\).*\(2, 3, 5\)"):
        token_log_probs(torch.zeros(2, 3, 5), torch.zeros(2, 4, 7, dtype=torch.int64))


def test_ratio_is_exactly_one_before_an_update():
    log_probs = (torch.randn(2, 3, 4) * 5).requires_grad_()
    advantages = torch.randn(2, 3)
    loss, metrics = policy_loss(log_probs, log_probs.detach(), advantages)
    assert metrics["ratio_mean"].item() == 1.0
    assert metrics["clip_fraction"].item() == 0.0
    assert metrics["approx_kl"].item() == 0.0
    assert loss.item() == pytest.approx(-advantages.mean().item(), abs=1e-6)
    loss.backward()
    # d loss / d log_prob = -A / (B G N) at ratio 1.
    assert log_probs.grad is not None
    assert torch.allclose(log_probs.grad, -advantages[..., None].expand(2, 3, 4) / 24)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # good and already much likelier: clipped, no push
        (0.5, 1.0, -0.5, -0.5),  # good and less likely: pushed up
        (1.5, -1.0, 1.5, 1.5),  # bad and likelier: pushed down, unbounded
        (0.5, -1.0, 0.8, 0.0),  # bad and already much less likely: clipped, no push
        (1.1, 2.0, -2.2, -2.2),  # inside the range
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, gradient: float):
    log_probs = torch.tensor([[[math.log(ratio)]]], requires_grad=True)
    value, metrics = policy_loss(log_probs, torch.zeros(1, 1, 1), torch.tensor([[advantage]]), clip_range=0.2)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-6)
    assert log_probs.grad is not None
    assert log_probs.grad.item() == pytest.approx(gradient, rel=1e-6)
    assert metrics["ratio_mean"].item() == pytest.approx(ratio, rel=1e-6)
    assert metrics["clip_fraction"].item() == float(abs(ratio - 1) > 0.2)
    assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-4)


def test_the_clip_range_is_the_one_given():
    log_probs = torch.tensor([[[math.log(1.15)]]])
    losses = [
        policy_loss(log_probs, torch.zeros(1, 1, 1), torch.ones(1, 1), clip_range=clip_range)[0].item()
        for clip_range in (0.1, 0.2)
    ]
    assert losses == pytest.approx([-1.1, -1.15])


def test_old_log_probs_are_a_constant():
    log_probs, old = torch.zeros(1, 2, 3, requires_grad=True), torch.zeros(1, 2, 3, requires_grad=True)
    policy_loss(log_probs, old, torch.ones(1, 2))[0].backward()
    assert log_probs.grad is not None
    assert old.grad is None


def test_per_token_advantages_generalize_per_sample_ones():
    old, new = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    advantages = torch.randn(2, 3)
    per_sample, _ = policy_loss(new, old, advantages)
    per_token, _ = policy_loss(new, old, advantages[..., None].expand(2, 3, 4))
    assert torch.equal(per_sample, per_token)


def test_per_token_advantages_credit_their_own_token():
    log_probs = torch.zeros(1, 1, 3, requires_grad=True)
    loss, _ = policy_loss(log_probs, torch.zeros(1, 1, 3), torch.tensor([[[3.0, 0.0, -6.0]]]))
    loss.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.flatten().tolist() == [-1.0, 0.0, 2.0]


def test_policy_loss_refuses_advantages_that_would_broadcast_by_accident():
    with pytest.raises(VarpiError, match=r"advantages \(3, 4\)"):
        policy_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(3, 4))


def test_prior_loss_is_the_mean_cross_entropy():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    targets = torch.randint(7, (2, 3))
    ours = prior_loss(logits, targets)
    theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    (ours_grad,) = torch.autograd.grad(ours, logits)
    (theirs_grad,) = torch.autograd.grad(theirs, logits)
    assert torch.allclose(ours_grad, theirs_grad, atol=1e-7)
    # By hand: uniform over 7 tokens.
    assert prior_loss(torch.zeros(1, 2, 7), torch.tensor([[0, 6]])).item() == pytest.approx(math.log(7))


def test_kl_prior_by_hand():
    log_probs = torch.tensor([[[0.0, 0.0]]], requires_grad=True)
    reference = torch.tensor([[[math.log(2.0), 0.0]]], requires_grad=True)
    value = kl_prior(log_probs, reference)
    assert value.item() == pytest.approx((2 - math.log(2) - 1) / 2)
    value.backward()
    # d/d log_prob of exp(Δ) - Δ - 1 is 1 - exp(Δ), over two tokens; the reference gets no gradient.
    assert log_probs.grad is not None
    assert log_probs.grad.flatten().tolist() == pytest.approx([-0.5, 0.0])
    assert reference.grad is None


def test_the_gradient_of_the_kl_prior_by_hand():
    """On samples in their exact proportions: the value of KL(current || reference), the gradient of the reverse one."""
    current, reference = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.25, 0.25, 0.5]).double()
    logits = current.log().requires_grad_()
    samples = torch.tensor([0, 0, 1, 2])
    loss = kl_prior(logits.log_softmax(0)[samples].view(1, 4, 1), reference.log()[samples].view(1, 4, 1))
    loss.backward()
    # KL(current || reference) = 0.5 log 2 + 0.25 log 1 + 0.25 log ½; ∇KL(reference || current) = current - reference.
    assert loss.item() == pytest.approx(0.25 * math.log(2))
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.25, 0.0, -0.25])
    # ∇KL(current || reference) would be current * (log(current / reference) - KL).
    assert abs(logits.grad[1] + 0.25 * 0.25 * math.log(2)) > 0.04


def test_kl_prior_estimates_the_divergence():
    """k3 is unbiased: its mean over tokens drawn from the current distribution is KL(current || reference)."""
    current, reference = torch.randn(2, 1, 1, 6).log_softmax(-1)
    tokens = torch.multinomial(current[0, 0].exp(), 200_000, replacement=True).reshape(1, -1, 1)
    estimate = kl_prior(token_log_probs(current, tokens), token_log_probs(reference, tokens))
    exact = (current.exp() * (current - reference)).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=0.03)


@pytest.mark.usefixtures("_slices")
def test_entropy():
    logits = torch.randn(3, 4, 9, requires_grad=True)
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    value = entropy(logits)
    assert not value.requires_grad
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert entropy(torch.zeros(1, 2, 8)).item() == pytest.approx(math.log(8))
    impossible = torch.tensor([[[0.0, 0.0, -torch.inf]]])
    assert entropy(impossible).item() == pytest.approx(math.log(2))
