"""Shared fixtures: where the golden data lies, and a quiet, deterministic torch."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with the golden fixtures and sample data, beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("golden fixtures are not beside this checkout (../shared)")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
