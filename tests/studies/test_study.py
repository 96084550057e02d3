"""Studies: what is refused, what is chosen by what, and that no interruption and no neighbour changes a number.

Where the logic alone is in question, the jobs are stand-ins that give numbers at once.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file

from varpi.data.shapes import CaptionedShapes
from varpi.errors import Stopped, VarpiError
from varpi.recipe import load_recipe
from varpi.runtime.sources import embedded
from varpi.runtime.tensors import sha256_of
from varpi.studies import shipped_studies
from varpi.studies import study as module
from varpi.studies.plan import Judge, Study, StudyData, load_study
from varpi.studies.study import carry_out_study, reward_networks
from varpi.studies.tasks import TOKENS, Subject, see_scenes
from varpi.studies.work import Job, Work, all_of, carry_out
from varpi.training import train
from varpi.training.run_directory import RunLock
from varpi.weights import save_generator, save_tokenizer

TEXT = """
title: Two methods on the digits
start: {generator: digits, tokenizer: digits}
data: {source: digits, image_size: 32}
seeds: [0, 1]
set: {training.steps: 2, training.batch_size: 2}
protocol:
  samples: 10
  sampling_seeds: [1000, 1001]
  judges: [{name: digits}]
  metrics: [frechet_distance, class_agreement]
validation:
  samples: 10
  sampling_seed: 999
  temperatures: [0.8, 1.0]
  guidance_scales: [1.0, 2.0]
compare_with: next_token
variants:
  cooler:
    sampling: {temperature: best}
  next_token:
    label: Cross-entropy alone
    recipe: digits-next-token
    tune:
      - optimizer.learning_rate: 1.0e-4
      - optimizer.learning_rate: 2.0e-4
  again:
    recipe: digits-next-token
    after: next_token
"""

SHORT = """
title: Two trainings on the digits
start: {generator: digits, tokenizer: digits}
data: {source: digits, image_size: 32}
seeds: [0, 1]
set: {training.steps: 2, training.batch_size: 2}
protocol: {samples: 10, sampling_seeds: [7], judges: [{name: digits}], metrics: [frechet_distance, class_agreement]}
variants:
  next_token: {recipe: digits-next-token}
  again: {recipe: digits-next-token, after: next_token}
"""


def read(folder: Path, text: str = TEXT, *settings: str) -> Study:
    path = folder / "pair.yaml"
    path.write_text(text)
    return load_study(str(path), settings)[0]


def carry(folder: Path, text: str = TEXT, *settings: str, jobs: int = 1, **options: Any) -> dict[str, Any]:
    """The study's JSON, without what a clock said."""
    study = read(folder, text, *settings)
    page = carry_out_study(
        study, "pair.yaml", folder / "out", jobs=jobs, device="cpu", command="varpi study pair", **options
    )
    assert page == folder / "out" / "study.html"
    return findings(folder / "out")


def findings(output: Path) -> dict[str, Any]:
    found = json.loads((output / "study.json").read_text())
    for row in found["rows"]:
        row.get("cost", {}).pop("seconds", None)
    return found


def value_of(place: str, split: str, guidance: float, temperature: float, seed: int) -> float:
    """A stand-in for the distance: the validation split likes what the test split does not."""
    rate = 0.5 if "learning_rate=0.0002" in place else 1.0
    wish = {"validation": rate, "test": 2 - rate}[split]
    return wish + {1.0: 0.0, 2.0: -0.25}[guidance] + {1.0: 0.0, 0.8: 0.125}[temperature] + (seed % 10) / 64


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Jobs without work. The dictionary changes them: "trained" sees each training, "value" gives the numbers."""
    hooks: dict[str, Any] = {"trained": lambda folder: None, "value": value_of, "done": []}

    def train(folder: Path, recipe: Any, device: str) -> dict[str, Any]:
        hooks["done"].append(str(folder).partition("/jobs/")[2])
        said = hooks["trained"](folder)
        if said is not None:
            return {"diverged": said}
        (folder / "run").mkdir(parents=True, exist_ok=True)
        (folder / "run" / "model.safetensors").touch()
        return {"sha256": hooks["done"][-1], "part": "generator", "steps": 2, "images": 4, "seconds": 0.5}

    def draw(folder: Path, weights: Any, asked: Any, sampling: Any, count: int, *rest: Any) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": torch.zeros(count, 64, dtype=torch.int32)}, folder / TOKENS)
        (folder / "about.json").write_text(
            json.dumps([weights.place, sampling.guidance_scale, sampling.temperature, sampling.seed])
        )
        return {"sha256": str(folder).partition("/jobs/")[2], "shown": [[0] * 64]}

    def measure(folder: Path, drawn: Path, weights: Any, asked: Any, *rest: Any) -> dict[str, Any]:
        place, *about = json.loads((drawn / "about.json").read_text())
        value = hooks["value"](place, asked.split, *about)
        return {"metrics": {"frechet_distance": value, "class_agreement": 0.5}, "warnings": []}

    monkeypatch.setattr(module, "train_variant", train)
    monkeypatch.setattr(module, "count_operations", lambda *arguments: {"operations": 1000.0})
    monkeypatch.setattr(module, "see_reference", lambda *arguments: {"sha256": "reference", "count": 800})
    monkeypatch.setattr(module, "draw_tokens", draw)
    monkeypatch.setattr(module, "measure_tokens", measure)
    return hooks


def row_of(found: Mapping[str, Any], name: str, *, guided: bool = False) -> dict[str, Any]:
    return next(row for row in found["rows"] if (row["name"], row["guided"]) == (name, guided))


# -- what is chosen, and reported


def test_what_is_chosen_is_chosen_on_the_validation_split(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    found = carry(tmp_path)
    tuned = row_of(found, "next_token")
    assert tuned["changes"] == {"optimizer.learning_rate": 2e-4}  # 1.5 on the test split, where the other has 1
    distance = tuned["metrics"]["digits"]["frechet_distance"]
    assert distance["mean"] == 1.5 + 0.5 / 64
    assert distance["values"] == {"0": [1.5, 1.5 + 1 / 64], "1": [1.5, 1.5 + 1 / 64]}
    assert row_of(found, "cooler")["sampling"]["temperature"] == 1.0
    guided = row_of(found, "next_token", guided=True)
    assert (guided["sampling"]["guidance_scale"], guided["cost"]["transformer_tokens_per_sample"]) == (2.0, 128)
    assert guided["metrics"]["digits"]["frechet_distance"]["mean"] == 1.25 + 0.5 / 64
    records = found["choices"]["next_token"]
    assert [(one["value"], one["chosen"]) for one in records] == [
        (1 + 9 / 64, False), (0.5 + 9 / 64, True),  # learning rates; the seed is 999
        (0.5 + 9 / 64, False), (0.25 + 9 / 64, True),  # guidance scales
    ]  # fmt: skip
    text = (tmp_path / "out" / "study.html").read_text()
    assert "learning rate 0.0001: 1.14; learning rate 0.0002: 0.641 (taken)" in text
    assert "by 10 samples of seed 999, which no figure uses, of the runs of training seed 0; 2 trials" in text
    assert "none for again" in text
    plain, guided_table = text.partition("difference to")[0].split("each at its own best guidance scale</h3>")
    assert [f">{name}<" in plain for name in ("Start", "cooler", "again")] == [False, True, True]  # cooler is just that
    assert [f">{name}<" in guided_table for name in ("Start", "cooler", "again")] == [True, False, True]


def test_what_each_row_costs_and_begins_with(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    found = carry(tmp_path)
    assert row_of(found, "next_token")["cost"] == {
        "steps": 2, "images": 4, "operations": 2000, "transformer_tokens_per_sample": 64
    }  # fmt: skip
    assert row_of(found, "again")["cost"]["images"] == 8  # those of what it begins with included
    assert row_of(found, "cooler")["cost"] == {"transformer_tokens_per_sample": 64}
    trained = [place for place in stand_ins["done"] if "next_token" in place]
    assert trained == [  # a trial that was not chosen is trained with one seed only
        "train/next_token/learning_rate=0.0001/seed-0",
        "train/next_token/learning_rate=0.0002/seed-0",
        "train/next_token/learning_rate=0.0002/seed-1",
    ]
    begun = json.loads((tmp_path / "out/jobs/train/again/seed-1/begun.json").read_text())["inputs"]
    parent = json.loads((tmp_path / "out/jobs" / trained[2] / "result.json").read_text())["result"]
    assert begun["generator_sha256"] == parent["sha256"]
    assert (begun["seed"], begun["training.steps"], begun["method.name"]) == (1, 2, "next_token")


def test_the_settings_of_fewer_variants_or_seeds_are_those_of_all(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    whole = carry(tmp_path)
    study = read(tmp_path).only(["again"])
    assert list(study.variants) == ["next_token", "again"]
    carry_out_study(study, "pair.yaml", tmp_path / "out", seeds=[1], jobs=1, device="cpu", command="varpi study pair")
    part = findings(tmp_path / "out")
    assert part["training_seeds"] == [1]
    assert row_of(part, "next_token")["changes"] == row_of(whole, "next_token")["changes"]
    values = row_of(whole, "again")["metrics"]["digits"]["frechet_distance"]["values"]
    assert row_of(part, "again")["metrics"]["digits"]["frechet_distance"]["values"] == {"1": values["1"]}
    assert part["winners"]["without_guidance"]["digits"] == {}  # one training seed has no spread
    carry_out_study(
        read(tmp_path).only(["cooler"]),
        "pair.yaml",
        tmp_path / "untrained",
        jobs=1,
        device="cpu",
        command="varpi study",
    )  # though what the study sets is for trainings
    with pytest.raises(VarpiError, match="--seeds 7: is none of the study's training seeds, 0, 1"):
        carry(tmp_path, seeds=[7])
    with pytest.raises(VarpiError, match="--only gone: there is no such variant, only cooler, next_token, again"):
        study = read(tmp_path).only(["gone"])


def test_a_training_that_diverges_loses_and_is_named(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    def diverges(folder: Path) -> str | None:
        gone = "learning_rate=0.0002" in str(folder) or folder.match("again/seed-1")
        return "step 3: 5 updates in a row had a non-finite loss" if gone else None

    stand_ins["trained"] = diverges
    found = carry(tmp_path)
    assert row_of(found, "next_token")["changes"] == {"optimizer.learning_rate": 1e-4}
    assert found["choices"]["next_token"][1] == {
        "changes": {"optimizer.learning_rate": 2e-4}, "value": None, "chosen": False
    }  # fmt: skip
    said = "again, seed 1: step 3: 5 updates in a row had a non-finite loss"
    assert row_of(found, "again")["diverged"] == said
    text = (tmp_path / "out" / "study.html").read_text()
    assert f"Not in the table, for their training diverged:</p>\n    <ul><li>again: {said}" in text


# -- interruptions, neighbours, other inputs


def test_a_job_that_fails_costs_no_other(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    def fails(folder: Path) -> None:
        if "next_token" in str(folder):
            raise VarpiError("no space left on the disk")

    def broken(place: str, *rest: Any) -> float:
        return float("nan") if place == "start" else 1.0

    stand_ins["trained"], stand_ins["value"] = fails, broken
    with pytest.raises(VarpiError) as error:
        carry(tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("measure/start/plain/10-seed-1000/against=test/digits: a result is not finite ({'metr")
    assert "train/next_token/learning_rate=0.0001/seed-0: no space left on the disk" in lines
    assert not (tmp_path / "out" / "study.json").exists()
    assert (tmp_path / "out/jobs/draw/start/plain/10-seed-1001/result.json").is_file()
    stand_ins["trained"], stand_ins["value"] = lambda folder: None, value_of
    stand_ins["done"].clear()
    assert row_of(carry(tmp_path), "again")["trained"]
    assert len(stand_ins["done"]) == 5  # now


def test_a_job_is_done_once_and_refused_for_another_study(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    first = carry(tmp_path)
    count = len(stand_ins["done"])
    assert carry(tmp_path, TEXT) == first
    assert len(stand_ins["done"]) == count
    files = {path: path.read_bytes() for path in (tmp_path / "out" / "jobs").rglob("*.json")}
    with pytest.raises(
        VarpiError, match=r"seed-0/result.json: training.steps is 2, here it is 3; it was made for anot"
    ):
        carry(tmp_path, TEXT, "set.training.steps=3")
    with pytest.raises(VarpiError, match=r"10-seed-1000/against=test/digits/result.json: metrics is \['frechet_dist"):
        carry(tmp_path, TEXT, "protocol.metrics=[frechet_distance]")
    assert {path: path.read_bytes() for path in files} == files
    longer = carry(tmp_path, TEXT, "seeds=[0, 1, 2]")  # what only adds jobs goes on
    assert row_of(longer, "again")["metrics"]["digits"]["frechet_distance"]["values"].keys() == {"0", "1", "2"}


def test_another_machine_goes_on_from_the_records(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    part = read(here).only(["next_token"])
    carry_out_study(part, "pair.yaml", here / "out", jobs=1, device="cpu", command="varpi study pair")
    records = here / "out" / "records.jsonl"
    done = [json.loads(line)["job"] for line in records.read_text().splitlines()]
    assert done == sorted(set(done))
    assert {"pair", "train/next_token/learning_rate=0.0002/seed-0"} <= {*done}

    stand_ins["done"].clear()
    found = carry(there, records=[records])
    # What a further job begins with is trained again, of the trial that was chosen; the other trial is not.
    chosen = "learning_rate=0.0002"
    expected = [
        *(f"train/next_token/{chosen}/seed-{seed}" for seed in (0, 1)),
        "train/again/seed-0",
        "train/again/seed-1",
    ]
    assert sorted(stand_ins["done"]) == sorted(expected)
    stand_ins["done"].clear()
    assert carry(tmp_path) == found  # as without records
    both = [json.loads(line)["job"] for line in (there / "out" / "records.jsonl").read_text().splitlines()]
    assert {*done} < {*both}
    stand_ins["done"].clear()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert carry(elsewhere, records=[there / "out" / "records.jsonl"]) == found
    assert stand_ins["done"] == []  # nothing but the page


def test_a_study_goes_on_from_its_own_records(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    """Those of another machine need not be given twice, and hold what was found without any job, too."""
    carry(tmp_path)
    records = (tmp_path / "out/records.jsonl").read_text()
    (tmp_path / "there/out").mkdir(parents=True)
    (tmp_path / "records.jsonl").write_text(records)
    carry(tmp_path / "there", records=[tmp_path / "records.jsonl"])
    assert (tmp_path / "there/out/records.jsonl").read_text() == records
    stand_ins["done"].clear()
    carry(tmp_path / "there")
    assert not stand_ins["done"]


def test_data_that_changed_between_trainings(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    carry(tmp_path)
    path = tmp_path / "out/jobs/train/next_token/learning_rate=0.0001/seed-0/result.json"
    record = json.loads(path.read_text())
    record["result"]["data"] = "what was there before"
    path.write_text(json.dumps(record))
    message = r"seed-0 were trained on other data: what digits holds has changed; remove .*out/jobs and .*out/records"
    with pytest.raises(VarpiError, match=message):
        carry(tmp_path)


def test_trials_whose_keys_end_alike_are_two(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    text = change("recipe: digits-next-token\n    tune", "recipe: digits\n    tune")
    for rate, key in (("1.0e-4", "training.precision"), ("2.0e-4", "method.reward.precision")):
        text = text.replace(f"optimizer.learning_rate: {rate}", f"{key}: bf16")
    carry(tmp_path, text)
    names = {f"train/next_token/{key}.precision=bf16/seed-0" for key in ("training", "method.reward")}
    assert names < {*stand_ins["done"]}


def test_two_jobs_of_one_name_are_refused(tmp_path: Path) -> None:
    work = Work(tmp_path / "out", 1)
    calls = [partial(work, Job("a", answer, (number,), {"number": number})) for number in (1, 2)]
    with pytest.raises(VarpiError, match="a: is the name of two jobs, which differ in what they depend on"):
        work.until(lambda: all_of(calls))


def test_what_cannot_be_measured_is_refused_before_any_training(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    text = change("[frechet_distance, class_agreement]", "[frechet_distance, kernel_distance]")
    with pytest.raises(VarpiError, match=r"kid cannot be computed: .*at least 1000"):
        carry(tmp_path, text)
    assert not stand_ins["done"]


def test_records_of_other_inputs_do_not_count(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    carry(tmp_path)
    other, count = tmp_path / "other", len(stand_ins["done"])
    other.mkdir()
    carry(other, TEXT, "set.training.steps=3", records=[tmp_path / "out" / "records.jsonl"])
    assert len(stand_ins["done"]) == 2 * count


def test_weights_that_come_out_otherwise_are_measured_anew(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    """As on another kind of processor: nothing of the record's weights is mixed with the new ones."""
    first = carry(tmp_path)
    records = tmp_path / "records.jsonl"
    lines = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    for line in lines:
        if line["job"] == "train/next_token/learning_rate=0.0002/seed-0":
            line["result"]["sha256"] = "of another processor"
    kept = [line for line in lines if line["job"] != "train/again/seed-0"]
    records.write_text("".join(json.dumps(line) + "\n" for line in kept))
    other = tmp_path / "other"
    other.mkdir()
    assert carry(other, records=[records]) == first


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"job": "pair", "inputs": "ab"}', '{"job": 1, "inputs": "ab", "result": {}}']
)
def test_records_that_are_none(line: str, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    records.write_text('{"job": "pair", "inputs": "ab", "result": {}}\n' + line + "\n")
    with pytest.raises(
        VarpiError, match=r"records\.jsonl, line 2: is no record of a study's job, as records\.jsonl of its"
    ):
        carry(tmp_path, records=[records])
    with pytest.raises(VarpiError, match=r"gone\.jsonl: cannot be read as records of a study"):
        carry(tmp_path, records=[tmp_path / "gone.jsonl"])
    assert not (tmp_path / "out").exists()


def test_a_job_of_another_process_is_waited_for(tmp_path: Path) -> None:
    job = Job("slow", answer, (41,), {"question": 1})
    held = RunLock(tmp_path / "jobs" / "slow")
    held.take()
    assert carry_out(tmp_path, job) is None
    path = tmp_path / "jobs" / "slow" / "result.json"

    def finish() -> None:
        path.write_text(json.dumps({"inputs": {"question": 1}, "result": {"answer": 7}}))
        held.let_go()

    Timer(0.7, finish).start()
    work = Work(tmp_path, 1)
    assert work.until(lambda: all_of([lambda: work(job)])) == [{"answer": 7}]  # the other's, not 41


def answer(folder: Path, number: int) -> dict[str, int]:
    return {"answer": number}


def wait_for_a_signal(folder: Path) -> dict[str, int]:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(100)
    return {}


def test_a_signal_ends_the_pool_and_says_how_to_go_on(tmp_path: Path) -> None:
    work = Work(tmp_path, 2)
    begun = time.monotonic()
    with pytest.raises(Stopped, match=r"stopped; what is done is in .*, and the same command goes on") as stopped:
        work.until(lambda: work(Job("slow", wait_for_a_signal, (), {})))
    assert stopped.value.signal == signal.SIGTERM
    assert time.monotonic() - begun < 60
    assert not (tmp_path / "jobs" / "slow" / "result.json").exists()


@pytest.mark.slow  # half a minute of processor time
@pytest.mark.timeout(900)
def test_a_study_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """Really trained, sampled and measured: at once, and in pieces by a process that is killed, one that is told to
    stop, and a third."""
    text = SHORT
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder in (whole, pieces):
        folder.mkdir()
    expected = carry(whole, text)
    study = read(pieces, text)
    command = [sys.executable, "-m", "varpi", "study", str(pieces / "pair.yaml"), "--output", str(pieces / "out")]
    for jobs, results, blow in (("1", 3, signal.SIGKILL), ("2", 9, signal.SIGTERM)):
        with subprocess.Popen([*command, "--jobs", jobs], stderr=subprocess.PIPE, text=True) as one:
            until(lambda least=results: len([*(pieces / "out").rglob("result.json")]) >= least, one)
            one.send_signal(blow)
            said = one.communicate()[1].splitlines()[-1]
    assert one.returncode == 143
    assert said == f"varpi study: stopped; what is done is in {pieces / 'out'}, and the same command goes on"
    assert not (pieces / "out" / "study.json").exists()
    found = carry(pieces, text)
    assert found == expected
    assert not [*(pieces / "out").rglob("checkpoints")]
    assert study.title in (pieces / "out" / "study.html").read_text()
    distances = [row["metrics"]["digits"]["frechet_distance"]["mean"] for row in found["rows"]]
    assert len({*distances}) == 3
    assert row_of(found, "again")["cost"]["operations"] == 2 * row_of(found, "next_token")["cost"]["operations"] > 1e9
    hashes = {seed: one["generator_sha256"] for seed, one in row_of(found, "next_token")["weights"].items()}
    assert len({*hashes.values(), found["pair"]["generator_sha256"]}) == 3


def until(ready: Callable[[], bool], process: "subprocess.Popen[Any]") -> None:
    deadline = time.monotonic() + 600
    while not ready():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- what is refused


def change(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (change("compare_with:", "compared_with:"), "pair.yaml: unknown key compared_with; did you mean compare_with?"),
        (change("tune:", "tuned:"), "unknown key variants.next_token.tuned; did you mean tune?"),
        (change("  again:", "  cooler:"), "the key cooler is given twice, in line 19 too"),
        (change("seeds: [0, 1]", "seeds: []"), "seeds is \\[\\]; it must be"),
        (TEXT.replace("seeds: [0, 1]\n", ""), "pair.yaml: seeds is missing"),
        (change("seeds: [0, 1]", "seeds: [0, 0]"), "seeds lists a seed twice"),
        (change("[1000, 1001]", "[1000, 1000]"), "protocol.sampling_seeds lists a seed twice"),
        (change("sampling_seed: 999", "sampling_seed: 1000"), "validation.sampling_seed is 1000, which figures use"),
        (change("  sampling_seed: 999", "  sampling_seed: 999\n  split: test"),
         "validation.split is test, which the protocol reports on"),
        (change("[{name: digits}]", "[{name: digits}, {name: digits}]"), "protocol.judges lists a network twice"),
        (change("temperatures: [0.8, 1.0]", "temperatures: []"), "cooler.sampling.temperature is best, but validation"),
        (change("after: next_token", "after: gone"), "variants.again.after is gone, and there is no such variant"),
        (change("after: next_token", "after: again"), "variants.again.after: again after again has no beginning"),
        (change("compare_with: next_token", "compare_with: cooler"), "must be one of the trained variants"),
        (TEXT + "    label: cooler\n", "variants: two are labelled cooler"),
        (change("  again:", "  start:"), "variants.start: start is what the start pair is called"),
        (change("  again:", "  a b:"), "variants.a b: a variant's name is of small letters, digits, _ and -"),
        (TEXT + "    tune: [optimizer.eps: 1.0e-8]\n", "tune: next_token 2 and again 1 trials"),
        (TEXT + "    set: {a.b: 1, a: {b: 2}}\n", "pair.yaml: set: a.b is given twice"),
        (change("recipe: digits-next-token\n    tune", "tune"), "variants.next_token: tune changes a recipe, and"),
        (change("metrics: [frechet", "metrics: [fid, frechet"), "protocol.metrics.0 is 'fid'; it must be"),
    ],
)  # fmt: skip
def test_a_file_that_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=message) as error:
        read(tmp_path, text)
    assert len(error.value.args) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT + "    set: {training.stepps: 2}\n", "variants.again: unknown key training.stepps; did you mean steps"),
        (TEXT + "    set: {seed: 2}\n", "variants.again sets seed, which the study says for all"),
        (TEXT + "    set: {data.source: x}\n", "variants.again sets data.source, which the study says for all"),
        (change("training.steps: 2", "training.stepps: 2"), "set.training.stepps: no recipe of this study has"),
        (TEXT + "  other:\n    recipe: digits-cca\n",
         r"again and other differ in optimizer.learning_rate \(0.0002 and 2e-05\), which neither sets: set it for one"),
        (change("recipe: digits-next-token\n    after", "recipe: nowhere\n    after"), "no recipe 'nowhere'"),
    ],
)  # fmt: skip
def test_variants_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=message):
        carry(tmp_path, text)
    assert not (tmp_path / "out").exists()


def test_variants_may_differ_in_what_they_say(tmp_path: Path) -> None:
    text = TEXT + "  other:\n    recipe: digits-cca\n    set: {optimizer: {learning_rate: 2.0e-5}}\n"
    recipes = read(tmp_path, text, "set.training.steps=7").recipes("pair.yaml")
    assert [recipe.optimizer.learning_rate for recipe in recipes["next_token"]] == [1e-4, 2e-4]
    assert recipes["other"][0].optimizer.learning_rate == 2e-5
    assert {recipe.training.steps for several in recipes.values() for recipe in several} == {7}


def test_the_classifier_that_rewards_is_not_the_judge() -> None:
    found = reward_networks([load_recipe("digits-ar-grpo")], "")
    assert found == {"rewards.classifier.weights: digits": sha256_of(embedded("digits", "perceptual"))}


def test_a_judge_that_rewards_is_refused(tmp_path: Path) -> None:
    judge = embedded("digits", "perceptual")
    text = change("[{name: digits}]", f"[{{name: digits, weights: '{judge}'}}]").replace(
        "-next-token\n    a", "\n    a"
    )
    with pytest.raises(
        VarpiError, match=r"variants.again is rewarded by the network that judges, digits \(reward.perc"
    ):
        carry(tmp_path, text)
    assert not (tmp_path / "out").exists()


def test_a_reward_that_is_not_there_or_half_trained_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / "cifar10-classifier" / "model.safetensors"
    changes = f"method.name: ar_grpo, method.rewards.classifier.weights: {weights}"
    text = TEXT + f"    set: {{{changes}}}\n"
    with pytest.raises(
        VarpiError, match=r"variants.again: method.rewards.classifier.weights: .* is not there; run `va"
    ):
        carry(tmp_path, text)
    (weights.parent / "checkpoints" / "step-00000001").mkdir(parents=True)
    weights.write_bytes(b"the best so far")
    (weights.parent / "recipe.yaml").write_text(load_recipe("digits-judge").to_yaml())
    with pytest.raises(VarpiError, match=f"variants.again: {weights.parent} has not been trained to its end"):
        carry(tmp_path, text)
    assert not (tmp_path / "out").exists()


def test_a_start_that_is_half_trained_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(read(tmp_path).recipes("pair.yaml")["again"][0].to_yaml())
    with pytest.raises(VarpiError, match=f"start: {run} has not been trained to its end; continue it with"):
        carry(tmp_path, TEXT, f"start.generator={run}")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(VarpiError, match="holds something that is not a study"):
        carry(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_a_number_of_samples_that_classes_do_not_divide(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    with pytest.raises(VarpiError, match="15 samples of 10 classes; it must be a multiple of 10"):
        carry(tmp_path, TEXT, "protocol.samples=15")


@pytest.mark.parametrize("name", shipped_studies())
def test_a_shipped_study_is_whole(name: str) -> None:
    study, where = load_study(name)
    recipes = study.recipes(where)
    assert recipes.keys() == {name for name, variant in study.variants.items() if variant.recipe}
    assert study.compare_with in recipes


def test_another_method_takes_the_place_of_the_whole_method(tmp_path: Path) -> None:
    text = TEXT + "  other:\n    recipe: digits\n    set: {method.name: cca, method.beta: 0.5}\n"
    (other,) = read(tmp_path, text, "set.training.save_every=1", "set.optimizer.learning_rate=3.0e-4").recipes("x")[
        "other"
    ]
    assert (other.method.name, other.method.model_dump()["beta"], other.optimizer.learning_rate) == ("cca", 0.5, 3e-4)


# -- generators of captions

CAPTIONS = """
title: The captioned shapes
start: {{generator: {run}/model.safetensors, tokenizer: {folder}/tokenizer.safetensors}}
data: {{source: shapes, image_size: 32}}
seeds: [0]
set: {{training.steps: 1, training.batch_size: 2, method.reward.perceptual_weight: 0.0}}
protocol:
  samples: 12
  sampling_seeds: [7, 8]
  judges: [{{name: shapes-detector}}, {{name: shapes-detector, split: held_out}}]
  metrics: [overall, single_object, counting, colors]
validation: {{samples: 6, sampling_seed: 9, metric: overall, guidance_scales: [1.0, 2.0]}}
variants:
  next_token: {{recipe: shapes-next-token}}
  va_pi: {{recipe: shapes}}
"""


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny generator of captions, trained for a step, in a study of two methods."""
    folder = tmp_path_factory.mktemp("captions")
    config = replace(tiny.GENERATOR, grid=8, conditioning="text", condition_tokens=12, caption_dim=128)
    save_generator(tiny.generator(config), folder / "generator.safetensors")
    save_tokenizer(tiny.tokenizer(), folder / "tokenizer.safetensors")
    settings = [
        f"generator.source={folder}/generator.safetensors",
        f"tokenizer.source={folder}/tokenizer.safetensors",
        "training.steps=1",
        "training.batch_size=2",
    ]
    train(load_recipe("shapes-next-token", settings), folder / "run", device="cpu", show=False)
    return {"run": folder / "run", "folder": folder}


def test_a_generator_of_captions_is_judged_by_what_it_was_asked(captioned: dict[str, Any], tmp_path: Path) -> None:
    found = carry(tmp_path, CAPTIONS.format(**captioned))
    measured = row_of(found, "va_pi")["metrics"]
    assert [*measured] == ["shapes-detector", "shapes-detector-held_out"]
    assert [*measured["shapes-detector"]] == ["overall", "single_object", "counting", "colors"]
    assert [*measured["shapes-detector-held_out"]] == ["overall", "colors"]  # the split has no other of these tasks
    for name, split in (("shapes-detector", "test"), ("shapes-detector-held_out", "held_out")):
        reference = found["references"][name]
        assert reference["sha256"] == CaptionedShapes(split=split).fingerprint
        assert reference["metrics"]["overall"] >= 0.9  # what the judge makes of the real scenes
        assert 0 <= measured[name]["overall"]["mean"] <= 1
    drawn = tmp_path / "out" / "jobs" / "draw" / "start" / "plain"
    assert {path.name for path in drawn.iterdir()} == {
        *(f"12-seed-{seed}-of-split={split}" for seed in (7, 8) for split in ("test", "held_out")),
        "6-seed-9-of-split=validation",
    }
    page = (tmp_path / "out" / "study.html").read_text()
    assert "by GenEval&#39;s rules, one for each of the first captions of shapes" in page
    assert "Judged by shapes-detector-held_out" in page


def test_what_draws_the_scenes_themselves_is_right(captioned: dict[str, Any], tmp_path: Path) -> None:
    asked = Subject(None, StudyData(source="shapes", image_size=32), "test")
    seen = see_scenes(tmp_path, asked, 60, Judge(name="shapes-detector"), "cpu")
    assert seen["metrics"]["overall"] >= 0.95
    assert asked.first(2) == [CaptionedShapes(split="test").caption(i) for i in range(2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"{name: shapes-detector}, ": "{{name: digits}}, "},
         r"protocol\.judges: digits is no judge of a generator of captions"),
        ({"{run}/model": "{folder}/generator"}, "names no text encoder; start with `shapes`, or a run's model"),
        ({", split: held_out": ""}, "protocol.judges lists a network twice"),
        ({"sampling_seed: 9,": "sampling_seed: 9, split: held_out,"}, "split is held_out, which the protocol"),
        ({"metric: overall": "metric: recall", "[overall": "[recall, overall"},
         "validation.metric is recall, which shapes-detector does not measure"),
    ],
)  # fmt: skip
def test_a_study_of_captions_that_is_refused(
    change: dict[str, str], message: str, captioned: dict[str, Any], tmp_path: Path
) -> None:
    text = CAPTIONS
    for old, new in change.items():
        old = old.replace("{name", "{{name").replace("}, ", "}}, ")
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(VarpiError, match=message):
        carry(tmp_path, text.format(**captioned))


def test_classes_are_not_judged_by_the_detector_of_shapes(tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=r"protocol\.judges: shapes-detector is no judge of a generator of classes"):
        carry(tmp_path, SHORT.replace("name: digits}", "name: shapes-detector}"))


def test_a_judge_of_captions_in_another_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=r"judges.0: precision is bf16; shapes-detector knows fp32 alone"):
        read(tmp_path, SHORT.replace("name: digits}", "name: shapes-detector, precision: bf16}"))


def test_a_judge_in_another_precision_is_another_judge(tmp_path: Path, stand_ins: dict[str, Any]) -> None:
    found = carry(tmp_path, TEXT.replace("{name: digits}", "{name: digits, precision: bf16}"))
    assert found["judges"]["digits"]["precision"] == "bf16"
