"""benchmarks/scaling.py: its seconds by hand."""

import importlib
from pathlib import Path

import pytest


def test_traffic_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GB of weights, gathered twice and reduced once, at four fifths of 450 GB/s in a node, of 50 between nodes."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    moving = importlib.import_module("scaling").seconds_moving
    inside = 24 * 7 / 8 / 360
    assert moving(8e9, 0, 1, 8, "all") == pytest.approx(inside)
    assert moving(8e9, 0, 1, 16, "all") == pytest.approx(24 * 15 / 16 / 40)
    assert moving(8e9, 0, 1, 16, "node") == pytest.approx(inside + 1 * 2 * (1 / 2) / 40)  # a part is 1 GB
    assert moving(8e9, 0, 1, 32, "node") == pytest.approx(inside + 1 * 2 * (3 / 4) / 40)
    frozen = moving(8e9, 1e9, 2, 8, "all") - moving(8e9, 0, 2, 8, "all")
    assert frozen == pytest.approx(3 * 7 / 8 / 360)  # to encode, and for two micro-batches' decoding
