"""torchrun: sampling, encoding and evaluation by several processes give the files and the numbers of one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_t5
import torch
from training_runs import contents, quiet

from varpi.cli.main import main
from varpi.evaluation import read_result
from varpi.recipe import load_recipe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As in the processes that torchrun starts, so that sums are rounded alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def alone(*arguments: object) -> None:
    assert main([*map(str, arguments), "--device", "cpu"]) == 0


def torchrun(size: int, *arguments: object) -> str:
    """What a command prints in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [sys.executable, *launcher, "-m", "varpi", *map(str, arguments), "--device", "cpu"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def sampling(pair: Path, output: Path, count: int) -> list[object]:
    given = [pair / "generator.safetensors", "--tokenizer", pair / "tokenizer.safetensors"]
    return ["sample", *given, "--count", count, "--batch-size", 4, "--guidance-scale", 1.5, "--output", output]


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_samples(pair: Path, size: int, tmp_path: Path) -> None:
    alone(*sampling(pair, tmp_path / "one", 42))
    said = torchrun(size, *sampling(pair, tmp_path / "samples", 42))
    assert said.count("wrote 42 images") == 1
    assert contents(tmp_path / "samples") == contents(tmp_path / "one")


def test_samples_of_killed_processes_are_finished_by_one(pair: Path, tmp_path: Path) -> None:
    """They meet nowhere, so that the environment is all that makes two processes two."""
    command = [sys.executable, "-m", "varpi", *map(str, sampling(pair, tmp_path / "samples", 600)), "--device", "cpu"]
    processes = [
        subprocess.Popen(
            command,
            env={**ENVIRONMENT, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        while not all((tmp_path / "samples" / name).is_file() for name in ("00000.png", "00004.png")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.001)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    begun = contents(tmp_path / "samples")
    assert "sample.json" not in begun
    assert "00599.png" not in begun
    alone(*sampling(pair, tmp_path / "samples", 600))
    alone(*sampling(pair, tmp_path / "whole", 600))
    finished = contents(tmp_path / "samples")
    assert finished == contents(tmp_path / "whole")
    whole = {name for name in begun if name.endswith(".png")}
    assert all(finished[name] == begun[name] for name in whole)


def test_encoded_images(pair: Path, tmp_path: Path) -> None:
    given = ["--tokenizer", pair / "tokenizer.safetensors", "--image-size", 32, "--batch-size", 700, "--output"]
    alone("encode", "images", "digits", *given, tmp_path / "one" / "tokens.safetensors")
    said = torchrun(2, "encode", "images", "digits", *given, tmp_path / "two" / "tokens.safetensors")
    assert said.count("wrote the tokens of 3800 of 3800 images") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_encoded_captions(tmp_path: Path) -> None:
    tiny.images(tmp_path / "images", "a")
    lines = [{"image": f"images/a/{i}.png", "text": f"a photo of {'a red ' * i}cat"} for i in range(8)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    encoder = tiny_t5.make(tmp_path / "t5", ("a", "photo", "of", "cat", "red"))
    command = ["encode", "captions", tmp_path / "captions.jsonl", "--text-encoder", encoder, "--batch-size", 3]
    alone(*command, "--output", tmp_path / "one")
    torchrun(2, *command, "--output", tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 9
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_an_evaluated_run(tmp_path: Path) -> None:
    settings = ["training.steps=1", "training.batch_size=4", "training.save_every=1", "method.group_size=2"]
    run = quiet(load_recipe("digits", settings), tmp_path / "run")
    command = ["evaluate", run, "--per-class", 3, "--batch-size", 4, "--features", "digits"]
    results, samples = [], []
    for size in (1, 2):
        where = ["--cache", tmp_path / f"cache{size}", "--json", tmp_path / f"{size}.json"]
        if size == 1:
            alone(*command, *where)
        else:
            assert torchrun(size, *command, *where).count("frechet_distance") == 1
        results.append(read_result(tmp_path / f"{size}.json"))
        (folder,) = (run / "samples").iterdir()
        samples.append(contents(folder.rename(tmp_path / f"samples{size}")))
    assert samples[0] == samples[1]
    assert results[0].metrics == results[1].metrics
    assert {"frechet_distance", "precision", "recall", "class_agreement"} <= set(results[0].metrics)
    assert results[0].samples == results[1].samples
