"""Sampling, encoding and evaluation by several processes give the files and the numbers of one.

In the ordinary suite by two; by three and four, and killed and gone on with, in the slow one.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import tiny
import tiny_t5
import torch
from launch import ENVIRONMENT, command, several
from training_runs import contents, quiet

from varpi.cli.main import main
from varpi.evaluation import read_result
from varpi.recipe import load_recipe

SLOW = pytest.mark.slow
sizes = pytest.mark.parametrize("size", [2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW)])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As in the processes that torchrun starts, so that sums are rounded alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(*arguments: object) -> None:
    assert main([*map(str, arguments), "--device", "cpu"]) == 0


def kill(size: int, arguments: Sequence[object], moment: Callable[[], bool]) -> None:
    """Begin a command in so many processes, and kill them all at a moment before its end."""
    launched = subprocess.Popen(
        command(size, arguments),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not moment():
            assert launched.poll() is None, "it came to its end"
            time.sleep(0.001)
    finally:
        with contextlib.suppress(ProcessLookupError):  # none is left
            os.killpg(launched.pid, signal.SIGKILL)
        launched.communicate()  # until all have closed it, and are gone


def sampling(pair: Path, output: Path, count: int) -> list[object]:
    given = [pair / "generator.safetensors", "--tokenizer", pair / "tokenizer.safetensors"]
    return ["sample", *given, "--count", count, "--batch-size", 4, "--guidance-scale", 1.5, "--output", output]


def encoding(pair: Path, output: Path, batch_size: int) -> list[object]:
    given = ["--tokenizer", pair / "tokenizer.safetensors", "--image-size", 32, "--batch-size", batch_size]
    return ["encode", "images", "digits", *given, "--output", output / "tokens.safetensors"]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[object]]:
    """The command that encodes 120 captions of different lengths, a hundred of which are different."""
    folder = tmp_path_factory.mktemp("captions")
    tiny.images(folder / "images", "a")
    lines = [{"image": f"images/a/{i % 8}.png", "text": f"a photo of {'a red ' * (i % 100)}cat"} for i in range(120)]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    encoder = tiny_t5.make(folder / "t5", ("a", "photo", "of", "cat", "red"))
    given = ["encode", "captions", folder / "captions.jsonl", "--text-encoder", encoder, "--batch-size", 3]
    return lambda output: [*given, "--output", output]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the digits, of one step."""
    settings = ["training.steps=1", "training.batch_size=4", "training.save_every=1", "method.group_size=2"]
    return quiet(load_recipe("digits", settings), tmp_path_factory.mktemp("run") / "run")


def evaluating(run: Path, output: Path) -> list[object]:
    settings = ["--per-class", 6, "--batch-size", 4, "--features", "digits"]
    return ["evaluate", run, *settings, "--cache", output / "cache", "--json", output / "result.json"]


def take_samples(run: Path) -> dict[str, bytes]:
    """The samples that an evaluation made of a run, which has none then."""
    (folder,) = (run / "samples").iterdir()
    found = contents(folder)
    for name in found:
        (folder / name).unlink()
    folder.rmdir()
    return found


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """What one process measures, and the samples that it made."""
    output = tmp_path_factory.mktemp("evaluated")
    alone(*evaluating(run, output))
    return output / "result.json", take_samples(run)


def assert_as_evaluated(evaluated: tuple[Path, dict[str, bytes]], result: Path, samples: dict[str, bytes]) -> None:
    expected, found = read_result(evaluated[0]), read_result(result)
    assert samples == evaluated[1]
    assert found.metrics == expected.metrics
    assert {"frechet_distance", "precision", "recall", "class_agreement"} <= set(found.metrics)
    assert found.samples == expected.samples


@sizes
def test_samples(pair: Path, size: int, tmp_path: Path) -> None:
    alone(*sampling(pair, tmp_path / "one", 42))
    said = several(size, sampling(pair, tmp_path / "samples", 42), torchrun=True)
    assert said.count("wrote 42 images") == 1
    assert contents(tmp_path / "samples") == contents(tmp_path / "one")


@sizes
def test_encoded_images(pair: Path, size: int, tmp_path: Path) -> None:
    alone(*encoding(pair, tmp_path / "one", 700))
    said = several(size, encoding(pair, tmp_path / "several", 700))
    assert said.count("wrote the tokens of 3800 of 3800 images") == 1
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


@sizes
def test_encoded_captions(captions: Callable[[Path], list[object]], size: int, tmp_path: Path) -> None:
    alone(*captions(tmp_path / "one"))
    several(size, captions(tmp_path / "several"))
    assert len(contents(tmp_path / "one")) == 121
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


@sizes
def test_an_evaluated_run(run: Path, evaluated: tuple[Path, dict[str, bytes]], size: int, tmp_path: Path) -> None:
    assert several(size, evaluating(run, tmp_path)).count("frechet_distance") == 1
    assert_as_evaluated(evaluated, tmp_path / "result.json", take_samples(run))


def test_samples_of_killed_processes_are_finished_by_one(pair: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples"
    kill(2, sampling(pair, output, 600), lambda: all((output / f"0000{i}.png").is_file() for i in (0, 4)))
    begun = contents(output)
    assert "sample.json" not in begun
    assert "00599.png" not in begun
    alone(*sampling(pair, output, 600))
    alone(*sampling(pair, tmp_path / "whole", 600))
    finished = contents(output)
    assert finished == contents(tmp_path / "whole")
    whole = {name for name in begun if name.endswith(".png")}
    assert all(finished[name] == begun[name] for name in whole)


@SLOW
@pytest.mark.parametrize(("killed", "then"), [(1, 3), (3, 2), (4, 4)])
@pytest.mark.parametrize("job", ["samples", "tokens", "features"])
def test_killed_and_gone_on_with(
    pair: Path, captions: Callable[[Path], list[object]], job: str, killed: int, then: int, tmp_path: Path
) -> None:
    """By any number of processes before and after."""
    jobs: dict[str, tuple[Callable[[Path], list[object]], str, str]] = {
        "samples": (lambda output: sampling(pair, output, 300), "*.png", "sample.json"),
        "tokens": (lambda output: encoding(pair, output, 16), "*.unfinished/0*.safetensors", "tokens.safetensors"),
        "features": (captions, "*/*.npy", "*/120.npy"),
    }
    arguments, part, last = jobs[job]
    kill(killed, arguments(tmp_path / job), lambda: any((tmp_path / job).glob(part)))
    assert not any((tmp_path / job).glob(last))
    several(then, arguments(tmp_path / job))
    alone(*arguments(tmp_path / "whole"))
    assert contents(tmp_path / job) == contents(tmp_path / "whole")


@SLOW
@pytest.mark.parametrize(("killed", "then"), [(2, 1), (1, 2), (3, 4)])
def test_an_evaluation_killed_twice(
    run: Path, evaluated: tuple[Path, dict[str, bytes]], killed: int, then: int, tmp_path: Path
) -> None:
    """While its samples are made, and while images go through the network."""
    arguments = evaluating(run, tmp_path)
    kill(killed, arguments, lambda: any(run.glob("samples/*/0*.png")))
    assert not any(run.glob("samples/*/sample.json"))
    kill(killed, arguments, lambda: any(tmp_path.glob("cache/*/0*.safetensors")))
    assert any(run.glob("samples/*/sample.json"))
    assert not (tmp_path / "result.json").exists()
    several(then, arguments)
    assert_as_evaluated(evaluated, tmp_path / "result.json", take_samples(run))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "training.setps=3"], "varpi train: digits.yaml: unknown key training.setps; did you mean steps?"),
        pytest.param(
            ["--set", "data.source=nowhere"],
            "varpi train: nowhere: no such data; give a directory, .parquet, .tar or .jsonl files, a Hub id (org/name) "
            "or 'digits'",
            marks=SLOW,
        ),
        pytest.param(["--setps", "3"], "varpi: error: unrecognized arguments: --setps 3", marks=SLOW),
    ],
)
def test_a_mistake_is_told_once(arguments: list[str], said: str, tmp_path: Path) -> None:
    launched = command(2, ["train", "digits", "--output", tmp_path / "run", *arguments], torchrun=True)
    done = subprocess.run(launched, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if line.startswith("varpi") and line != "varpi FAILED"] == [said]
    assert done.stderr.count("exitcode  : 2 ") == 2  # of each process, as torchrun saw it; it exits with 1 itself
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()
