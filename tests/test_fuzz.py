"""A small part of `make soak`: damaged files of every format, and the fuzzer itself."""

import random
import subprocess
import sys
from pathlib import Path

from fuzz import FORMATS, changed, wrong_message

from varpi.errors import VarpiError

FUZZ = Path(__file__).with_name("fuzz.py")


def test_damaged_files_of_every_format() -> None:
    done = subprocess.run(
        [sys.executable, FUZZ, "--cases", "200", "--seed", "1", "-j", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"{7 * len(FORMATS)} cases, 0 wrong, seed 1" in done.stdout


def test_a_case_depends_on_its_seed_alone() -> None:
    data = bytes(range(256)) * 8
    cases = [changed(data, random.Random(f"1 png {number}")) for number in range(50)]
    assert cases == [changed(data, random.Random(f"1 png {number}")) for number in range(50)]
    assert len(set(cases)) > 45


def test_what_a_message_must_be() -> None:
    assert wrong_message(VarpiError("a.png: unreadable", "b.png: unreadable")) is None
    for message in ("", "two\nlines", "long" * 600):
        assert wrong_message(VarpiError(message)), message
