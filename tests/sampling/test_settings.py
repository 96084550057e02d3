"""The settings of sampling: worked by hand, refused out of range."""

from typing import Any

import pytest

from varpi.errors import VarpiError
from varpi.sampling.settings import Sampling


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(-1, [4.0] * 6), (0, [4.0, 4.0, 1, 1, 1, 1]), (2, [4.0, 4.0, 4.0, 4.0, 1, 1])],
)
def test_an_interval_keeps_the_first_token_and_so_many_decoding_steps(interval: int, expected: list[float]) -> None:
    assert Sampling(guidance_scale=4.0, guidance_interval=interval).scales(6) == expected


def test_the_power_cosine_schedule() -> None:
    schedule: Any = {"guidance_scale": 3.0, "guidance_schedule": "power-cosine"}
    half = 0.5**0.5
    assert Sampling(**schedule, guidance_power=1.0).scales(5) == pytest.approx([3, 1, 2 - half, 2, 2 + half])
    assert Sampling(**schedule, guidance_power=1.0, guidance_interval=1).scales(5) == pytest.approx(
        [3, 1, 2 - half, 1, 1]
    )
    assert Sampling(**schedule, guidance_power=2.0).scales(3) == pytest.approx([3, 1, 2 - half])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; it must be at least 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "2"}, "guidance_scale is '2'; it must be a number"),
        ({"guidance_interval": -2}, "guidance_interval is -2"),
        ({"guidance_interval": 1.5}, "guidance_interval is 1.5; it must be a whole number"),
        ({"guidance_schedule": "linear"}, "guidance_schedule is 'linear'; it must be 'constant' or 'power-cosine'"),
        ({"guidance_power": 0.0}, "guidance_power is 0.0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        Sampling(**settings)
