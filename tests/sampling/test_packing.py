"""Packed linear layers against the plain ones."""

import pytest
import torch
from torch import nn

from varpi.sampling.packing import packed_linears


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 96), nn.Linear(96, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.inference_mode()
def test_packed_equals_plain(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = Small().to(dtype)
    for rows in (1, 8, 40):
        x = torch.randn(rows, 1, 48, dtype=dtype)
        expected = model(x)
        with packed_linears(model, 8):
            assert all("forward" in vars(layer) for layer in (model.up, model.down))
            packed = model(x)
        assert packed.dtype == dtype
        torch.testing.assert_close(packed, expected, atol=tolerance, rtol=tolerance)
    assert not any("forward" in vars(layer) for layer in (model.up, model.down))


@torch.no_grad()
def test_under_autocast_the_copies_are_in_its_dtype() -> None:
    torch.manual_seed(0)
    model, x = Small(), torch.randn(4, 48)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with packed_linears(model, 4):
            packed = model(x)
    assert packed.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(packed, expected, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_new_weights_count_and_an_error_unpacks() -> None:
    model, x = Small(), torch.ones(2, 48)
    with pytest.raises(ZeroDivisionError), packed_linears(model, 2):
        raise ZeroDivisionError
    model.down.weight.zero_()
    assert model(x).abs().max() == 0
    with packed_linears(model, 2):
        assert model(x).abs().max() == 0
