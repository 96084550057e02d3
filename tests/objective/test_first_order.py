"""The first-order expected reward against autograd, finite differences and numbers worked by hand."""

import math

import pytest
import torch

from varpi.errors import VarpiError
from varpi.objective import RewardWeights, first_order_loss, score_codes


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
