"""Shared fixtures: where the golden data lies, a pair small enough to train, and a quiet, deterministic torch."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory with the golden fixtures and sample data, beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("golden fixtures are not beside this checkout (../shared)")
    return SHARED


@pytest.fixture(scope="session")
def fill(shared: Path) -> ModuleType:
    """The rule that makes the weights of the golden fixtures."""
    spec = importlib.util.spec_from_file_location("fixture_fill", shared / "fixtures" / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random pair, its images and its recipes; see tiny.py. Read only."""
    return tiny.make(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
