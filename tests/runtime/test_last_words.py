"""What one process of several says when it fails, in the directory that torchrun would keep for them."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from varpi.runtime import last_words as module
from varpi.runtime.last_words import first_to_say, last_words


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of three processes; the signals are as before in the end."""
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.3)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def test_each_thing_is_said_once_and_all_end_together(attempt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, waited = [], []
    for rank, text in enumerate(("no such data", "no such data", "out of memory")):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(attempt / str(rank) / "error.json"))
        with last_words(text) as ours:
            said.append(ours)
            begun = time.monotonic()
        waited.append(time.monotonic() - begun)
    assert said == [True, False, True]
    assert min(waited[:2]) >= 0.3 > waited[2]  # the last one had nobody to wait for
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # torchrun ends those that are left
    assert [first_to_say(text) for text in ("no such data", "a warning", "a warning")] == [False, True, False]


def test_what_cannot_be_agreed_on_is_said(attempt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(attempt / "gone" / "0" / "error.json"))
    with last_words("text") as ours:
        assert ours


@pytest.mark.parametrize("reserved", [None, ""])
def test_one_process_says_it_at_once(monkeypatch: pytest.MonkeyPatch, reserved: str | None) -> None:
    """Alone, or where torchrun keeps no files."""
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    if reserved is not None:
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", reserved)
    begun = time.monotonic()
    for _ in range(2):
        assert first_to_say("a warning")
        with last_words("text") as ours:
            assert ours
    assert time.monotonic() - begun < 1
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
