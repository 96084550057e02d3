"""Starting: the version, and that nothing heavy is imported before a command runs."""

import os
import subprocess
import sys

import pytest

import varpi
from varpi.cli.main import main

HEAVY = ("torch", "numpy", "PIL", "yaml", "pydantic", "transformers", "datasets")
COMMANDS = ("demo", "recipes", "train", "sample", "evaluate", "study", "play", "encode", "export", "report", "doctor")


def imported_by(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter holds after `code`."""
    program = f"import atexit, sys\natexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules]))\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].strip("[]").replace("'", "").replace(",", "").split()


def test_importing_varpi_imports_nothing_heavy() -> None:
    assert imported_by("import varpi") == []
    assert imported_by("import varpi; varpi.VQConfig") != []  # the probe sees what there is


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported_by(f"from varpi.cli.main import main\nmain({arguments})") == []


def test_help_takes_less_than_half_a_second() -> None:
    """Of the processor's time: what else runs on the machine does not count."""
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "varpi", "--help"], capture_output=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0 < min(seconds) < 0.5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"varpi {varpi.__version__}\n"
