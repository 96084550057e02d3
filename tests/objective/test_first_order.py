"""The first-order expected reward against autograd, finite differences and numbers worked by hand."""

import itertools
import math

import pytest
import torch

from varpi.errors import VarpiError
from varpi.objective import (
    RewardWeights,
    first_order_loss,
    group_advantages,
    policy_loss,
    residual_advantages,
    score_codes,
    token_log_probs,
)


def test_by_hand():
    # One position, two codes on the axes, g = (2, -1): values 2 and -1. Logits (ln 3, 0): π = (3/4, 1/4).
    logits = torch.tensor([[[math.log(3.0), 0.0]]], requires_grad=True)
    gradients = torch.tensor([[[[3.0, -2.0]], [[1.0, 0.0]]]])  # two samples, whose mean is g
    loss = first_order_loss(logits, torch.eye(2), gradients)
    assert loss.item() == pytest.approx(0.75 * 2 - 0.25)
    loss.backward()
    assert logits.grad is not None
    # π_k (v_k - v̄) with v̄ = 1.25
    torch.testing.assert_close(logits.grad, torch.tensor([[[0.75 * 0.75, 0.25 * -2.25]]]))


def test_equals_autograd(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 7, requires_grad=True)
    codebook, gradients = torch.randn(7, 5), torch.randn(3, 2, 4, 5)
    plain = (logits.softmax(-1) @ codebook * gradients.mean(1)).sum((1, 2)).mean()
    (expected,) = torch.autograd.grad(plain, logits)
    for elements in (1, 1 << 24):  # one image at a time, and all at once
        monkeypatch.setattr("varpi.objective.losses._TEMPORARY_ELEMENTS", elements)
        loss = first_order_loss(logits, codebook, gradients)
        (found,) = torch.autograd.grad(2 * loss, logits)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(found, 2 * expected)


def test_misfits_are_refused():
    with pytest.raises(VarpiError, match=r"gradients \(2, 1, 3, 5\) must be"):
        first_order_loss(torch.zeros(2, 4, 7), torch.zeros(7, 5), torch.zeros(2, 1, 3, 5))


def test_a_linear_error_is_reproduced_exactly():
    """Where the decoder is linear and the error too (L1 of one sign), the first-order loss is the expected error."""
    torch.manual_seed(1)
    codebook, logits = torch.rand(6, 3), torch.randn(1, 4, 6, requires_grad=True)
    samples = torch.randint(6, (1, 2, 4))
    codes = codebook[samples].transpose(2, 3).unflatten(3, (2, 2))
    images = -torch.ones(1, 3, 2, 2)  # below every decoded value, so that |decoded - image| = decoded + 1
    rewards, gradients = score_codes(lambda piece: piece, codes, images, RewardWeights(0.0, 0.0, 1.0))
    torch.testing.assert_close(rewards.total, -(codes + 1).mean((2, 3, 4)))
    expected = (logits.softmax(-1) @ codebook).mean()
    loss = first_order_loss(logits, codebook, gradients)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def test_residual_advantages_by_hand():
    # One position, codes 1 and 3 on a line; errors x² - x: rewards 0 and -6, gradients 1 and 5.
    rewards = torch.tensor([[0.0, -6.0]])
    gradients, vectors = torch.tensor([[[[1.0]], [[5.0]]]]), torch.tensor([[[[1.0]], [[3.0]]]])
    # Sample 0 by the other's gradient 5: 0 + 5·1, against -6 + 5·3. Sample 1 by 1: -6 + 1·3, against 0 + 1·1.
    assert residual_advantages(rewards, gradients, vectors).tolist() == [[5.0 - 9.0, -3.0 - 1.0]]
    with pytest.raises(VarpiError, match=r"rewards have shape \(1, 1\); \(B,G\) with G >= 2 is needed"):
        residual_advantages(rewards[:, :1], gradients[:, :1], vectors[:, :1])


@pytest.mark.parametrize("group_size", [2, 3])
def test_as_a_control_variate_it_leaves_the_gradient_unbiased(group_size: int):
    """Every group of samples there is, weighted by its probability: V = 3, N = 2, an error that is far from linear."""
    torch.manual_seed(0)
    codebook, mix = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    logits = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=2)))  # (9,2)
    vectors = codebook[sequences].requires_grad_()
    errors = (vectors.flatten(1) @ mix).sin().sum(1) + vectors.flatten(1).square().sum(1)
    (slopes,) = torch.autograd.grad(errors.sum(), vectors)
    vectors, errors = vectors.detach(), errors.detach()
    log_probs = token_log_probs(logits, sequences[None])[0].sum(1)
    probabilities = log_probs.detach().exp()
    (exact,) = torch.autograd.grad((log_probs.exp() * errors).sum() / 2, logits)  # a mean over tokens, as the policy's

    def policy(samples: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        chosen = token_log_probs(logits, sequences[samples][None])
        return policy_loss(chosen, chosen.detach(), advantages)[0]

    means = {}
    for group in itertools.product(range(9), repeat=group_size):
        samples = torch.tensor(group)
        rewards, gradients = -errors[samples][None], slopes[samples][None]
        residual = policy(samples, residual_advantages(rewards, gradients, vectors[samples][None]))
        plain = group_advantages(rewards, baseline="leave_one_out", scale_by_std=False, clip=math.inf)
        scaled = policy(samples, group_advantages(rewards))
        for name, loss in {
            "both": residual + first_order_loss(logits, codebook, gradients) / 2,
            "leave_one_out": policy(samples, plain),
            "scaled": scaled,
        }.items():
            (gradient,) = torch.autograd.grad(loss, logits)
            means[name] = means.get(name, 0) + probabilities[samples].prod() * gradient
    torch.testing.assert_close(means["both"], exact, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(means["leave_one_out"], exact, atol=1e-6, rtol=1e-6)
    assert (means["scaled"] - exact).abs().max() > 1e-2  # Eq. 4 divides by a random number
