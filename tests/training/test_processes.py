"""Several gloo processes against one: the same losses at the same global batch, checkpoints that either continues."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from launch import several
from training_runs import numbers, quiet, steps_saved, weights

from varpi.errors import VarpiError
from varpi.recipe import load_recipe
from varpi.runtime.processes import World
from varpi.training import read_metrics
from varpi.training.sharding import part_held, shard

# Dropout's masks are drawn by each process; all else must agree. Local batches of 4 are cut into 3 and 1, the six
# held-out images leave the second process without any, and the clip is low enough to bind. The rate is low and eps
# high: Adam makes whole steps of gradients that are mere rounding, and one sampled token that flips changes the rest.
SETTINGS = (
    "generator.dropout=0",
    "method.prior=kl",
    "method.condition_drop=0.3",
    "training.micro_batch=3",
    "training.save_every=2",
    "validation.every=2",
    "optimizer.gradient_clip=0.5",
    "optimizer.learning_rate=1e-3",
    "optimizer.eps=1e-3",
)
TWELVE = ("training.batch_size=12", "training.steps=4")
COMPARED = ("loss", "reward_mean", "reward_std", "policy_loss", "prior_loss", "cross_entropy", "entropy", "ratio_mean")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As in the processes that torchrun starts, so that sums are rounded alike where they can be."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(pair: Path, run: Path, *settings: str) -> list[str]:
    given = ["train", str(pair / "va_pi.yaml"), "--output", str(run), "--resume"]
    return [*given, *(part for setting in (*SETTINGS, *settings) for part in ("--set", setting))]


@pytest.fixture(scope="module")
def one(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps in one process."""
    return quiet(tiny.recipe(pair, *SETTINGS), tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in two processes."""
    run = tmp_path_factory.mktemp("two") / "run"
    several(2, arguments(pair, run, "training.steps=4"), torchrun=True)
    return run


def assert_close(run: Path, expected: Path, steps: int) -> None:
    rows = [row for row in numbers(expected) if row["step"] <= steps]
    assert [row["step"] for row in numbers(run)] == [row["step"] for row in rows]
    for row, other in zip(numbers(run), rows, strict=True):
        assert row.keys() == other.keys()
        for name in COMPARED if "loss" in row else ("validation_loss",):
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (row["step"], name)
        if "loss" in row:
            assert row["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)


def test_two_processes_give_the_losses_of_one(one: Path, two: Path) -> None:
    assert_close(two, one, 4)
    assert {path.name for path in (two / "checkpoints" / "step-00000004").glob("*.distcp")} == {
        "__0_0.distcp",
        "__1_0.distcp",
    }


def test_two_processes_write_in_the_background(pair: Path, one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    several(2, arguments(pair, run, "training.steps=4", "training.save_every=1", "training.save_in_background=true"))
    assert_close(run, one, 4)
    assert steps_saved(run) == [3, 4]
    shutil.rmtree(run / "checkpoints" / "step-00000004")  # what is left was written while the fourth step was made
    quiet(tiny.recipe(pair, *SETTINGS), run, resume=True)
    assert_close(run, one, 6)


def test_two_processes_roll_out_as_one(pair: Path, tmp_path: Path) -> None:
    """Sharded generators decode with their caches, and are trained on what they made."""
    settings = ["generator.dropout=0", "training.micro_batch=2", "training.steps=2", "optimizer.eps=1e-3"]
    one = quiet(tiny.recipe(pair, *settings, method="ar_grpo"), tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "varpi"]
    command += ["train", str(pair / "ar_grpo.yaml"), "--output", str(tmp_path / "two"), "--device", "cpu"]
    for setting in settings:
        command += ["--set", setting]
    paths = os.pathsep.join([os.path.dirname(tiny.__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    for row, other in zip(numbers(tmp_path / "two"), numbers(one), strict=True):
        for name in ("loss", "reward_mean", "reward_std", "kl", "entropy"):
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (row["step"], name)


def test_one_process_continues_what_two_began(pair: Path, one: Path, two: Path, tmp_path: Path) -> None:
    run = shutil.copytree(two, tmp_path / "run")
    quiet(tiny.recipe(pair, *SETTINGS), run, resume=True)
    assert_close(run, one, 6)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(run)[name], tensor, atol=1e-4, rtol=1e-4)


def test_two_processes_continue_what_one_began_and_stop_together(pair: Path, one: Path, tmp_path: Path) -> None:
    """SIGTERM reaches one of them alone; both save, and exit as it asked."""
    run = quiet(tiny.recipe(pair, *SETTINGS, "training.steps=2"), tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(port)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "varpi", *arguments(pair, run, "training.steps=5000"), "--device", "cpu"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        while read_metrics(run)[-1]["step"] < 7 and all(process.poll() is None for process in processes):
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in processes] == [143, 143]
    finally:
        for process in processes:
            process.kill()
    stopped = read_metrics(run)[-1]["step"]
    assert steps_saved(run)[-1] == stopped >= 7
    kept = [row for row in numbers(run) if row["step"] <= 6]
    for row, other in zip(kept, numbers(one), strict=True):
        name = "loss" if "loss" in row else "validation_loss"
        assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)


def test_two_nodes_hold_a_copy_each(pair: Path, one: Path, tmp_path: Path) -> None:
    """Each node of two processes has the whole model; a checkpoint of theirs is continued by one process."""
    run = tmp_path / "run"
    nodes = arguments(pair, run, "training.shard_over=node", "training.micro_batch=1", "training.steps=4")
    several(4, nodes, nodes=2)
    assert_close(run, one, 4)
    assert len([*(run / "checkpoints" / "step-00000004").glob("*.distcp")]) == 4
    quiet(tiny.recipe(pair, *SETTINGS, "training.micro_batch=1"), run, resume=True)
    assert_close(run, one, 6)


def test_unequal_nodes_are_refused() -> None:
    class Unequal(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, value, 1]

    with pytest.raises(VarpiError, match=r"training\.shard_over: node needs equal nodes; here they have 1, 2 proc"):
        shard(torch.nn.Linear(1, 1), Unequal(0, 3, "cpu", per_node=2), "node")


def test_copies_of_a_part_draw_alike() -> None:
    """Their bf16 moments are rounded at random, and rounded differently they would part."""
    worlds = [World(rank, 4, "cpu", per_node=2) for rank in range(4)]
    assert [part_held(world, "node") for world in worlds] == [0, 1, 0, 1]
    assert [part_held(world, "all") for world in worlds] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def twelve(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of twelve images in one process."""
    return quiet(tiny.recipe(pair, *SETTINGS, *TWELVE), tmp_path_factory.mktemp("twelve") / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "micro_batch"), [(2, "null"), (2, 4), (3, "null"), (3, 3), (4, "null"), (4, 2)], ids=str
)
def test_twelve_images_however_they_are_shared(
    pair: Path, twelve: Path, size: int, micro_batch: object, tmp_path: Path
) -> None:
    """6, 4 and 3 images a process, at once or cut into 4 and 2, 3 and 1, 2 and 1."""
    settings = [*TWELVE, f"training.micro_batch={micro_batch}"]
    several(size, arguments(pair, tmp_path / "run", *settings))
    assert_close(tmp_path / "run", twelve, 4)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_bf16(pair: Path, size: int, tmp_path: Path) -> None:
    """Autocast decides alone what is computed in bf16, and gradients are summed in fp32.

    One process that takes the batch in as many parts computes just what several do: the first step differs by the order
    of fp32 sums alone, 1e-6, where one bf16 rounding would be 4e-3. From then on weights that differ in their last bits
    may fall on the other side of a bf16 rounding: 2e-3. Of three processes only the first loss is so near: in one, the
    share of each part goes through the backward pass, and a third moves bf16 roundings that a half or a quarter leaves.
    """
    settings = [setting for setting in SETTINGS if "micro_batch" not in setting]
    settings += ["training.batch_size=12", "training.precision=bf16", "training.steps=3", "optimizer.gradient_clip=1e9"]
    one = quiet(tiny.recipe(pair, *settings, f"training.micro_batch={12 // size}"), tmp_path / "one")
    several(size, arguments(pair, tmp_path / "several", *settings, "training.micro_batch=null"))
    expected, found = ([row for row in numbers(run) if "loss" in row] for run in (one, tmp_path / "several"))
    assert [row["step"] for row in found] == [1, 2, 3]
    for name in COMPARED:
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-6, abs=1e-7), name
    exact = size != 3
    assert found[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], rel=1e-6 if exact else 4e-3)
    for row, other in zip(found[1:], expected[1:], strict=True):
        for name in ("cross_entropy", "prior_loss", "gradient_norm") if exact else ("cross_entropy",):
            assert row[name] == pytest.approx(other[name], rel=2e-3 if exact else 1e-2, abs=1e-4), (row["step"], name)


@pytest.fixture(scope="module")
def parquet(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair's training images in four files of parquet, six in each."""
    folder = tmp_path_factory.mktemp("parquet")
    images = sorted((pair / "images" / "train").rglob("*.png"))
    for file in range(4):
        own = images[file::4]
        cells = [{"bytes": path.read_bytes(), "path": path.name} for path in own]
        table = pa.table({"image": cells, "label": ["abc".index(path.parent.name) for path in own]})
        pq.write_table(table, folder / f"train-{file}.parquet")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_four_processes_then_two_then_one(pair: Path, parquet: Path, kind: str, tmp_path: Path) -> None:
    """Each continues what the one before left; the whole is the run of one process."""
    settings = ["validation=null", "training.micro_batch=2"]
    if kind == "stream":
        settings += [f"data.source={parquet}", "data.stream=true", "data.lanes=4", "data.classes=[a,b,c]"]
        settings += ["data.shuffle_buffer=3"]
    one = quiet(tiny.recipe(pair, *SETTINGS, *settings, "training.steps=6"), tmp_path / "one")
    for size, steps in ((4, 2), (2, 4)):
        several(size, arguments(pair, tmp_path / "run", *settings, f"training.steps={steps}"))
        assert steps_saved(tmp_path / "run")[-1] == steps
    quiet(tiny.recipe(pair, *SETTINGS, *settings, "training.steps=6"), tmp_path / "run", resume=True)
    for row, other in zip(numbers(tmp_path / "run"), numbers(one), strict=True):
        for name in COMPARED:
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (row["step"], name)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (
            "digits-tokenizer",
            ("method.adversarial_weight=0.1", "method.usage_weight=0", "preview={every: 1, images: 2}"),
        ),
        ("digits-perceptual", ()),
    ],
)
def test_what_makes_tokenizers_and_judges_in_two_processes(
    recipe: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    """With validation, and pictures where there are any: the losses of one process."""
    shared = ["training.steps=2", "training.batch_size=8", "validation={every: 1, images: 12}", *settings]
    given = [part for setting in shared for part in ("--set", setting)]
    several(2, ["train", recipe, "--output", tmp_path / "two", *given])
    one = quiet(load_recipe(recipe, shared), tmp_path / "one")
    for row, other in zip(numbers(tmp_path / "two"), numbers(one), strict=True):
        for name in {"loss", "mse", "adversarial", "discriminator", "validation_loss", "preview_loss"} & other.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-4), (row["step"], name)
    assert weights(tmp_path / "two").keys() == weights(one).keys()


def test_a_detector_in_two_processes(tmp_path: Path) -> None:
    """Its means are over what answers in a process's own images, so that losses agree roughly."""
    shared = ["training.steps=2", "training.batch_size=8", "training.precision=fp32", "method.channels=[8, 8, 16]"]
    shared += ["validation.every=1", "validation.images=4"]
    several(2, ["train", "shapes-detector", "--output", tmp_path / "two"] + [p for s in shared for p in ("--set", s)])
    one = quiet(load_recipe("shapes-detector", shared), tmp_path / "one")
    for name, rel in (("loss", 0.1), ("validation_loss", 0.01)):
        rows = [[row[name] for row in numbers(run) if name in row] for run in (tmp_path / "two", one)]
        assert len(rows[0]) > 1
        assert rows[0] == pytest.approx(rows[1], rel=rel)
