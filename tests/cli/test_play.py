"""`varpi play`: the address it prints, how it stops, and what it refuses."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from varpi.cli.main import main, make_parser
from varpi.errors import VarpiError
from varpi.play import server
from varpi.weights import save_generator


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command is refused with."""
    assert main(["play", *map(str, arguments), "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("how", "code", "words"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped")]
)
def test_it_serves_until_it_is_stopped_and_leaves_nothing(
    pair: Path, tmp_path: Path, how: signal.Signals, code: int, words: str
) -> None:
    arguments = [pair / "generator.safetensors", "--tokenizer", pair / "tokenizer.safetensors", "--port", "0"]
    command = [sys.executable, "-u", "-m", "varpi", "play", *map(str, arguments), "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    assert running.stdout is not None
    said = re.fullmatch(r"(http://127\.0\.0\.1:\d+) \(Ctrl-C stops\)\n", running.stdout.readline())
    assert said is not None
    with urllib.request.urlopen(said[1], timeout=60) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert b"varpi play" in answer.read()
    assert len(list(tmp_path.glob("varpi-play-*"))) == 1
    running.send_signal(how)
    _, error = running.communicate(timeout=60)
    assert running.returncode == code
    assert error.splitlines()[-1] == f"varpi play: {words}"
    assert "Traceback" not in error
    assert list(tmp_path.glob("varpi-play-*")) == []


def test_a_port_in_use_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        line = refused(capsys, "runs/none", "--port", port)
    assert line == f"varpi play: --host 127.0.0.1 --port {port}: Address already in use; choose another"


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(VarpiError, match=r"^--host 192\.0\.2\.1 --port 0: .*; choose another$"):
        server.listen("192.0.2.1", 0)
    with pytest.raises(VarpiError, match=r"^--host no such host: no address of this machine"):
        server.listen("no such host", 0)


def test_it_listens_to_this_machine_alone_unless_told_otherwise() -> None:
    assert make_parser().parse_args(["play"]).host == "127.0.0.1"
    assert make_parser().parse_args(["play"]).generator == "digits"


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    assert refused(capsys) == "varpi play: the playground needs Gradio: pip install 'varpi[play]'"


def test_a_run_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs/none: no such file or directory" in refused(capsys, "runs/none", "--port", 0)
    assert "runs/none: no such file or directory" in refused(capsys, "digits", "--compare", "runs/none", "--port", 0)


def test_a_generator_of_captions_needs_an_encoder(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny.GENERATOR, conditioning="text", condition_tokens=8, caption_dim=128)
    save_generator(tiny.generator(config), tmp_path / "text.safetensors")
    line = refused(capsys, tmp_path / "text.safetensors", "--tokenizer", pair / "tokenizer.safetensors", "--port", 0)
    assert "this generator reads caption features; name what makes them of a prompt (--text-encoder)" in line


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range_is_refused(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, f"--port={port}") == f"varpi play: --port is {port}; it must be in [0, 65535]"
