"""`varpi evaluate` and `varpi sample` together: what is made is measured, the same whatever form it comes in."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import quiet

from varpi.cli import evaluate
from varpi.cli.main import main
from varpi.cli.sample import Wanted
from varpi.errors import VarpiError
from varpi.evaluation import differences, read_result
from varpi.evaluation.distances import frechet_distance
from varpi.evaluation.result import Result
from varpi.weights import save_generator

DIGITS = ["--features", "digits", "--device", "cpu"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty samples of the embedded generator."""
    folder = tmp_path_factory.mktemp("samples") / "base"
    assert run("sample", "digits", "--tokenizer", "digits", "--per-class", 8, "--seed", 5, "--output", folder) == 0
    return folder


def measured(path: Path, source: Path, *more: object) -> Any:
    assert run("evaluate", source, *DIGITS, "--json", path, *more) == 0
    return read_result(path)


def test_folder_npz_and_record_give_the_same_numbers(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for image in sorted(samples.glob("0*.png")):
        (tmp_path / "folder" / image.name).write_bytes(image.read_bytes())
    sampled = measured(tmp_path / "a.json", samples)
    numbers = dict(sampled.metrics)
    assert 0.5 < numbers.pop("class_agreement") < 1
    assert sampled.details["class_agreement"].keys() == {str(digit) for digit in range(10)}
    folder = measured(tmp_path / "b.json", tmp_path / "folder")
    npz = measured(tmp_path / "c.json", samples / "samples.npz")
    assert folder.metrics == npz.metrics == numbers
    assert folder.samples["sha256"] == npz.samples["sha256"] == sampled.samples["sha256"]
    assert set(numbers) >= {"frechet_distance", "precision", "recall", "inception_score"}
    assert sampled.reference["count"] == 800
    assert sampled.sampling["seed"] == 5
    assert sampled.sampling["guidance_scale"] == 1.0
    assert differences({"one": sampled, "other": sampled}) == []


def test_a_run_is_sampled_and_measured_like_its_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from varpi.recipe import load_recipe

    settings = ["training.steps=1", "training.batch_size=4", "training.save_every=1", "method.group_size=2"]
    folder = quiet(load_recipe("digits", settings), tmp_path / "run")
    sampling = ["--per-class", 5, "--seed", 3, "--temperature", 0.9]
    result = measured(tmp_path / "run.json", folder, *sampling)
    (kept,) = (folder / "samples").iterdir()
    assert "wrote samples to" in capsys.readouterr().err
    again = measured(tmp_path / "again.json", folder, *sampling)
    assert "wrote samples to" not in capsys.readouterr().err
    assert again.metrics == result.metrics
    assert run("sample", folder, *sampling, "--output", tmp_path / "images") == 0
    assert measured(tmp_path / "images.json", tmp_path / "images").metrics == result.metrics
    assert measured(tmp_path / "npz.json", kept / "samples.npz").samples["sha256"] == result.samples["sha256"]
    assert len(json.loads((kept / "sample.json").read_text())["generator_sha256"]) == 64
    assert run("evaluate", folder, *DIGITS) == 2
    assert "is a run: say what to sample from it" in capsys.readouterr().err


def test_samples_of_a_run_are_known_by_dtype_and_what_files_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def stop(_: Any, folder: Path) -> None:
        asked.append(folder)
        raise VarpiError("far enough")

    def folder(*sampling: object) -> Path:
        assert run("evaluate", tmp_path, "--device", "cpu", *sampling) == 2
        return asked.pop()

    monkeypatch.setattr("varpi.cli.evaluate.prepare", stop)
    for name in ("recipe.yaml", "model.safetensors"):
        (tmp_path / name).touch()
    assert folder("--per-class", 1) == folder("--per-class", 1) != folder("--per-class", 1, "--dtype", "bfloat16")
    prompts, captions = tmp_path / "prompts.txt", tmp_path / "captions.jsonl"
    for sampling in (["--prompts", prompts], ["--captions", captions, "--caption-split", "train"]):
        folders = []
        for text in ("a cat", "a dog"):
            prompts.write_text(text)
            captions.write_text(json.dumps({"image_path": "a.png", "text": [text]}))
            folders += [folder(*sampling), folder(*sampling)]
        assert folders[0] == folders[1] != folders[2] == folders[3]


def test_two_evaluations_of_a_run_at_once(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While one makes the samples the other is refused; those that were finished meanwhile are measured as they are."""
    monkeypatch.setattr("varpi.networks.loading.load_extractor", lambda *_, **__: _Pixels())
    folder = quiet(tiny.recipe(pair, "training.steps=1"), tmp_path / "run")
    command = ["evaluate", folder, "--reference", pair / "images" / "train", "--metrics", "fid", "--device", "cpu"]
    command += ["--per-class", 2]
    prepare, make = evaluate.prepare, Wanted.make

    def while_made(*given: Any, **more: Any) -> bool:
        assert run(*command) == 2
        assert "another process is at work there; wait for it" in capsys.readouterr().err
        return make(*given, **more)

    def made_meanwhile(*given: Any) -> Wanted:
        wanted = prepare(*given)
        monkeypatch.setattr(evaluate, "prepare", prepare)
        assert run(*command, "--batch-size", 4, "--json", tmp_path / "first.json") == 0
        return wanted

    monkeypatch.setattr(evaluate, "prepare", made_meanwhile)
    monkeypatch.setattr(Wanted, "make", while_made)
    assert run(*command, "--json", tmp_path / "second.json") == 0
    first, second = (read_result(tmp_path / name) for name in ("first.json", "second.json"))
    assert first.samples == second.samples
    assert second.sampling is not None
    assert second.sampling["batch_size"] == 4


def test_interrupted_and_resumed_gives_the_same_numbers(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from varpi.networks.extractors import Network

    whole = measured(tmp_path / "whole.json", samples, "--batch-size", 16)
    extract, calls = Network.__call__, []

    def stopping(self: Network, images: Any) -> Any:
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return extract(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Network, "__call__", stopping)
        cached = ["--batch-size", 16, "--cache", tmp_path / "cache"]
        assert run("evaluate", samples, *DIGITS, *cached) == 130
    assert measured(tmp_path / "resumed.json", samples, *cached).metrics == whole.metrics


def test_metrics_are_chosen_and_refused(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = measured(tmp_path / "few.json", samples, "--metrics", "fid,class_agreement")
    assert set(chosen.metrics) == {"frechet_distance", "class_agreement"}
    alone = measured(tmp_path / "alone.json", samples, "--metrics", "class_agreement")
    assert alone.metrics == {"class_agreement": chosen.metrics["class_agreement"]}
    assert alone.details == chosen.details
    assert alone.reference is None
    assert differences({"few": chosen, "alone": alone}) == []
    photographs = ["--features", "cifar10", "--metrics", "class_agreement"]  # has no reference of its own
    assert measured(tmp_path / "other.json", samples, *photographs).evaluator["extractor"]["name"] == "cifar10"
    assert run("evaluate", samples, *DIGITS, "--metrics", "fdi") == 2
    assert "'fdi'" in capsys.readouterr().err
    assert run("evaluate", samples / "samples.npz", *DIGITS, "--metrics", "fid,class_agreement") == 2
    assert "tells which classes of the judge were asked for" in capsys.readouterr().err
    assert run("evaluate", samples, "--device", "cpu") == 2
    assert "--reference is missing: an ADM .npz" in capsys.readouterr().err
    assert run("evaluate", tmp_path / "gone", *DIGITS) == 2
    assert "gone" in capsys.readouterr().err


def test_the_fréchet_distance_is_the_function_of_the_features(samples: Path, tmp_path: Path) -> None:
    import torch

    from varpi.data import open_dataset
    from varpi.data.pixels import from_uint8
    from varpi.networks.judges import embed, load_judge

    judge, digits = load_judge(), open_dataset("digits", image_size=32, split="test")
    real = embed(judge, torch.stack([digits[i].image for i in range(len(digits))]))[0]
    made = embed(judge, from_uint8(np.load(samples / "samples.npz")["arr_0"]))[0]
    expected = frechet_distance(real, made)
    found = measured(tmp_path / "r.json", samples, "--metrics", "fid").metrics["frechet_distance"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_alignment_of_a_run(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = ("method.context_noise=0.5", "method.context_noise_end=0.25")
    folder = quiet(tiny.recipe(pair, "training.steps=1", *noise), tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        load = Mock(return_value=_Pixels())
        patch.setattr("varpi.networks.loading.load_extractor", load)
        command = ["evaluate", folder, "--kind", "alignment", "--device", "cpu", "--split", "validation"]
        assert run(*command, "--precision", "bf16", "--json", tmp_path / "a.json") == 0
    assert load.call_args.kwargs["precision"] == "bf16"
    result = read_result(tmp_path / "a.json")
    assert result.kind == "alignment"
    assert result.sampling["generator"] == str(folder)
    assert (result.evaluator or {})["context_noise"] == 0.25  # what it was trained under at last
    assert {"reconstruction_reward", "prior_term", "entropy_gap", "round_trip_changed"} <= set(result.metrics)
    assert "reconstruction_reward" in capsys.readouterr().out
    assert run(*command, "--metrics", "fid") == 2
    assert "alignment has one fixed set" in capsys.readouterr().err


class _Pixels:
    """An extractor for images of any size: their mean colour."""

    name = "pixels"
    identity = {"name": "pixels"}  # noqa: RUF012
    streams = {"pool": 3}  # noqa: RUF012
    warnings = ()

    def __call__(self, images: Any) -> dict[str, Any]:
        return {"pool": images.float().mean(dim=(2, 3))}


def test_geneval_from_a_file_of_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = [
        {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
        {"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}],
         "prompt": "a photo of two cups"},
    ]  # fmt: skip
    detections = {}
    for i, record in enumerate(metadata):
        folder = tmp_path / "root" / f"{i:05d}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(record))
        for j in range(2):
            Image.fromarray(np.full((8, 8, 3), 40 * j, dtype=np.uint8)).save(folder / "samples" / f"{j:04d}.png")
            boxes = {"cow": [[0, 0, 4, 4, 0.95]]} if j == 0 else {"cup": [[0, 0, 4, 4, 0.95], [4, 4, 8, 8, 0.95]]}
            detections[f"{i:05d}/samples/{j:04d}.png"] = {"detections": boxes, "colors": {}}
    (tmp_path / "seen.json").write_text(json.dumps(detections))
    command = ["evaluate", tmp_path / "root", "--kind", "geneval", "--detections", tmp_path / "seen.json"]
    assert run(*command, "--json", tmp_path / "g.json") == 0
    result = read_result(tmp_path / "g.json")
    assert result.metrics["single_object"] == 0.5
    assert result.metrics["counting"] == 0.5
    assert result.evaluator["name"] == "GenEval (detections from seen.json)"
    assert "overall" in capsys.readouterr().out


def test_samples_in_parts_are_those_of_one(tmp_path: Path) -> None:
    command = ["sample", "digits", "--tokenizer", "digits", "--per-class", 1, "--seed", 5, "--output"]
    assert run(*command, tmp_path / "one", "--batch-size", 10) == 0
    assert run(*command, tmp_path / "three", "--batch-size", 3) == 0
    one, three = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "three"))
    assert np.abs(one.astype(int) - three).max() <= 1  # the decoder rounds by the size of its batch
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "three")]
    assert names[0] == names[1] >= {"00009.png", "grid.png", "sample.json"}


def test_a_page_of_a_comparison(samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured(tmp_path / "base.json", samples)
    guided = ["--per-class", 8, "--seed", 5, "--guidance-scale", 2, "--output", tmp_path / "guided"]
    assert run("sample", "digits", "--tokenizer", "digits", *guided) == 0
    measured(tmp_path / "guided.json", tmp_path / "guided")
    names = [f"base={tmp_path / 'base.json'}", f"guided={tmp_path / 'guided.json'}"]
    compare = ["report", "--device", "cpu", "--output", tmp_path / "page.html", "--compare"]
    assert run(*compare, *names, "--embeddings", "digits") == 0
    page = (tmp_path / "page.html").read_text()
    assert "base against guided" in page
    assert "These rows differ in more than the model" in page
    assert "guidance scale" in page
    assert "Changes by class" in page
    assert page.count("generated images, one class a column") == 4
    assert "t-SNE" in page

    capsys.readouterr()
    run("evaluate", samples, *DIGITS, "--reference", samples, "--json", tmp_path / "other.json")
    assert run(*compare, names[0], f"other={tmp_path / 'other.json'}") == 2
    assert "have another reference" in capsys.readouterr().err
    other = json.loads((tmp_path / "base.json").read_text())
    (tmp_path / "objects.json").write_text(json.dumps({**other, "kind": "geneval", "metrics": {"overall": 0.3}}))
    assert run(*compare, names[0], f"other={tmp_path / 'objects.json'}") == 2
    assert "base has results of kind distribution and other of kind geneval: they do not" in capsys.readouterr().err
    assert run(*compare, "base.json") == 2
    assert "expected NAME=RESULT.json" in capsys.readouterr().err
    assert run("report", "--device", "cpu") == 2
    assert "give either a RUN or results to --compare" in capsys.readouterr().err
    assert run(*compare[:3], "--compare", *names) == 2
    assert "--output is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "digits"], "image_size is 16; the embedded digits are 32x32"),
        (
            ["--features", "digits", "--reference", "images", "--metrics", "fid"],
            "digits knows images of 32x32",
        ),
        (["--features", "inception", "--weights", "gone.pth", "--reference", "images"], "gone.pth"),
        (["--features", "digits", "--reference", "gone"], "gone: no such file"),
        (["--features", "digits", "--reference", "images", "--metrics", "fdi"], "no metric 'fdi'"),
        (["--features", "digits", "--reference", "images", "--kid-subset-size", 10, "--metrics", "kid"], "at least 10"),
        (["--kind", "text"], "--kind text needs samples of prompts; these are of classes"),
        (["--kind", "geneval"], "--geneval: give GenEval's metadata by --prompts"),
    ],
)
def test_a_run_is_sampled_only_when_it_can_be_measured(
    pair: Path, tmp_path: Path, more: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = quiet(tiny.recipe(pair, "training.steps=1"), tmp_path / "run")
    more = [str(pair / "images" / "train") if word == "images" else word for word in more]
    assert run("evaluate", folder, "--per-class", 1, "--device", "cpu", *more) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "samples").exists()


def test_absurd_counts_are_refused(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [pair / "generator.safetensors", "--tokenizer", pair / "tokenizer.safetensors", "--device", "cpu"]
    for flag in ("--count", "--per-class"):
        assert run("sample", *given, flag, 10**15, "--output", tmp_path / "samples") == 2
        assert "no space left on the disk for" in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def test_alignment_numbers_classes_as_the_generator_does(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three classes are never renumbered in silence."""
    images = tiny.images(tmp_path / "images", "ac", per_class=1)
    named = tiny.generator()
    named.class_names = ("c", "b", "a")
    save_generator(named, tmp_path / "named.safetensors")
    seen: list[list[Any]] = []

    def measured(generator: Any, tokenizer: Any, dataset: Any, **_: Any) -> Result:
        seen.append([dataset[i].condition for i in range(len(dataset))])
        return Result("alignment", {}, {}, None, None, {})

    monkeypatch.setattr("varpi.evaluation.alignment.evaluate_alignment", measured)
    rest = ["--tokenizer", str(pair / "tokenizer.safetensors"), "--kind", "alignment", "--features", "digits"]
    rest += ["--device", "cpu", "--data", str(images), "--split", "train"]
    assert main(["evaluate", str(tmp_path / "named.safetensors"), *rest]) == 0
    assert seen == [[2, 0]]
    assert main(["evaluate", str(pair / "generator.safetensors"), *rest]) == 2
    assert "images names 2 classes (a, c, …), the generator knows 3 and no names for them" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    names = ["--class-names", str(tmp_path / "names.txt")]
    assert main(["evaluate", str(pair / "generator.safetensors"), *rest, *names]) == 0
    assert seen == [[2, 0], [0, 2]]


def test_tokens_of_classes_that_are_named(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tiny.images(tmp_path / "images", "ac", per_class=1)
    encode = ["encode", "images", str(images), "--tokenizer", str(pair / "tokenizer.safetensors"), "--device", "cpu"]
    encode += ["--image-size", "16", "--class-names", str(tmp_path / "names.txt")]
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    assert main([*encode, "--output", str(tmp_path / "t.safetensors")]) == 0
    assert load_file(tmp_path / "t.safetensors")["classes"].tolist() == [0, 2]
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["varpi"])["class_names"] == ["a", "b", "c"]
    (tmp_path / "names.txt").write_text("c\nb\na\n")
    assert main([*encode, "--output", str(tmp_path / "t.safetensors")]) == 2
    assert "already exists and holds other tokens" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("a\nb\n")
    assert main([*encode, "--output", str(tmp_path / "u.safetensors")]) == 2
    assert "1 of its 2 classes (c) are none of the 2 known ones (a, b, …)" in capsys.readouterr().err
