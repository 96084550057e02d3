"""The guided prior against torch's own cross-entropy and numbers worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from varpi.errors import VarpiError
from varpi.objective.guidance import guide, guided_prior


def test_guidance_is_the_samplers_formula():
    conditional, null = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 4.0]]])
    torch.testing.assert_close(guide(conditional, null, 1.5), torch.tensor([[[1.5, 1.0]]]))
    torch.testing.assert_close(guide(conditional, null, 1.0), conditional)


def test_by_hand():
    # Target (3/4, 1/4), current (1/2, 1/2): cross-entropy ln 2, gradient π - p.
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    loss = guided_prior(logits, torch.tensor([[[math.log(3.0), 0.0]]]))
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[[-0.25, 0.25]]]))


def test_equals_torch(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    logits, target = torch.randn(3, 4, 7, requires_grad=True), torch.randn(3, 4, 7)
    plain = F.cross_entropy(logits.flatten(0, 1), target.softmax(-1).flatten(0, 1))
    (expected,) = torch.autograd.grad(plain, logits)
    for elements in (1, 1 << 24):
        monkeypatch.setattr("varpi.objective.losses._TEMPORARY_ELEMENTS", elements)
        loss = guided_prior(logits, target)
        (found,) = torch.autograd.grad(3 * loss, logits)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(found, 3 * expected)


def test_no_gradient_where_current_and_target_agree():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    guided_prior(logits, logits.detach() + 7.0).backward()  # logits are known up to a constant
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-7


def test_misfits_are_refused():
    with pytest.raises(VarpiError, match="must be alike"):
        guided_prior(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
