"""The command line: what each command writes, and bad input, refused with one line, exit code 2 and nothing changed."""

import json
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import contents

from varpi.cli.main import main
from varpi.data import open_dataset
from varpi.evaluation.result import Result, write_result
from varpi.recipe import parse_recipe
from varpi.tokenizers import VQConfig
from varpi.weights import export_original, load_generator, load_tokenizer, save_tokenizer, to_original


class Place:
    """A directory of its own, a command line, and what it said."""

    def __init__(self, pair: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.pair, self.folder, self.capsys = pair, folder, capsys

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def run(self, *arguments: object) -> str:
        """Carry a command out; what it printed."""
        code = main([str(argument) for argument in arguments])
        said = self.capsys.readouterr()
        assert code == 0, said.err
        return said.out

    def refused(self, *arguments: object) -> str:
        """Have a command refused, in one line, with nothing written; the line."""
        before = contents(self.folder), contents(self.pair)
        code = main([str(argument) for argument in arguments])
        said = self.capsys.readouterr()
        assert code == 2
        assert said.out == ""
        assert said.err.startswith(f"varpi {arguments[0]}: ")
        assert said.err.count("\n") == 1, said.err
        assert said.err.endswith("\n")
        assert (contents(self.folder), contents(self.pair)) == before
        return said.err

    def train(self, *settings: str, method: str = "va_pi", resume: bool = False, run: str = "run") -> list[str]:
        command = ["train", str(self.pair / f"{method}.yaml"), "--output", str(self / run), "--device", "cpu"]
        for setting in settings:
            command += ["--set", setting]
        return [*command, "--resume"] if resume else command

    def sample(self, *more: object) -> list[object]:
        pair = [self.pair / "generator.safetensors", "--tokenizer", self.pair / "tokenizer.safetensors"]
        return ["sample", *pair, "--output", self / "samples", *more]

    def encode(self, *more: object, data: Path | None = None, size: int = 16) -> list[object]:
        source = data if data is not None else self.pair / "images"
        tokenizer = ["--tokenizer", self.pair / "tokenizer.safetensors"]
        return [
            "encode",
            "images",
            source,
            *tokenizer,
            "--image-size",
            size,
            "--output",
            self / "tokens.safetensors",
            *more,
        ]


@pytest.fixture
def place(pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(pair, tmp_path, capsys)


# -- what the commands do


def test_train(place: Place) -> None:
    said = place.run(*place.train("training.steps=1"))
    assert said == f"wrote {place / 'run' / 'model.safetensors'}\n"
    assert load_generator(place / "run").num_tokens == 16


def test_print_recipe_writes_nothing(place: Place) -> None:
    said = place.run(*place.train("seed=77"), "--print-recipe")
    recipe = parse_recipe(yaml.safe_load(said))
    assert recipe == tiny.recipe(place.pair, "seed=77")
    assert contents(place.folder) == {}


def test_sample(place: Place) -> None:
    place.run(*place.sample("--per-class", 2, "--seed", 4, "--temperature", 0.8, "--guidance-scale", 2))
    folder = place / "samples"
    names = [f"{i:05d}.png" for i in range(6)]
    assert {path.name for path in folder.iterdir()} == {*names, "grid.png", "samples.npz", "sample.json"}
    archive = np.load(folder / "samples.npz")["arr_0"]
    assert archive.shape == (6, 16, 16, 3)
    assert archive.dtype == np.uint8
    for name, image in zip(names, archive, strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / name)), image)
    assert len({image.tobytes() for image in archive}) > 1
    record = json.loads((folder / "sample.json").read_text())
    assert record["classes"] == [0, 1, 2, 0, 1, 2]
    assert (record["seed"], record["temperature"], record["guidance_scale"]) == (4, 0.8, 2.0)


def test_sample_repeats_itself_whatever_the_batch(place: Place) -> None:
    archives = []
    for batch, seed in ((64, 0), (2, 0), (64, 1)):
        place.run(*place.sample("--count", 5, "--batch-size", batch, "--seed", seed))
        archives.append(np.load(place / "samples" / "samples.npz")["arr_0"])
        shutil.rmtree(place / "samples")
    assert np.array_equal(archives[0], archives[1])
    assert not np.array_equal(archives[0], archives[2])


def test_sample_in_bfloat16(place: Place) -> None:
    place.run(*place.sample("--classes", "0,1,2"))
    assert "dtype" not in json.loads((place / "samples" / "sample.json").read_text())
    exact = np.load(place / "samples" / "samples.npz")["arr_0"]
    shutil.rmtree(place / "samples")
    place.run(*place.sample("--classes", "0,1,2", "--dtype", "bfloat16"))
    assert json.loads((place / "samples" / "sample.json").read_text())["dtype"] == "bfloat16"
    assert not np.array_equal(np.load(place / "samples" / "samples.npz")["arr_0"], exact)


def test_sample_of_named_classes(place: Place) -> None:
    place.run(*place.sample("--classes", "2,0", "--greedy"))
    assert json.loads((place / "samples" / "sample.json").read_text())["classes"] == [2, 0]


def test_encode(place: Place) -> None:
    said = place.run(*place.encode("--batch-size", 7))
    assert said == f"wrote the tokens of 24 of 24 images to {place / 'tokens.safetensors'}\n"
    tensors = load_file(place / "tokens.safetensors")
    dataset = open_dataset(place.pair / "images", image_size=16)
    tokenizer = load_tokenizer(place.pair / "tokenizer.safetensors")
    expected = tokenizer.encode(torch.stack([dataset[i].image for i in range(24)]))
    assert torch.equal(tensors["tokens"], expected.int())
    assert tensors["classes"].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert tensors["indices"].tolist() == list(range(24))
    with safe_open(place / "tokens.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["varpi"])["fingerprint"] == dataset.fingerprint


def test_encode_leaves_out_what_it_cannot_read(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    images = tiny.images(place / "images", per_class=3)
    (images / "b" / "1.png").write_bytes(b"no image")
    assert main([str(a) for a in place.encode(data=images)]) == 0
    assert place.capsys.readouterr().out.startswith("wrote the tokens of 8 of 9 images")
    assert f"{images}: left out 1 of 9 images: 1 unreadable ({images / 'b' / '1.png'}: " in caplog.text
    assert load_file(place / "tokens.safetensors")["indices"].tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_export(place: Place, suffix: str) -> None:
    """A run's generator and a tokenizer, under LlamaGen's names, to the last bit."""
    place.run(*place.train("training.steps=1"))
    for checkpoint, kind, more, key in (
        (place / "run", "generator", [], "tok_embeddings.weight"),
        (place.pair / "tokenizer.safetensors", "tokenizer", ["--tokenizer"], "quantize.embedding.weight"),
    ):
        output = place / f"{kind}.{suffix}"
        assert place.run("export", checkpoint, "--output", output, *more) == f"wrote {output}\n"
        content: Any = load_file(output) if suffix == "safetensors" else torch.load(output, weights_only=True)
        tensors = content["model"] if suffix == "pt" and kind == "tokenizer" else content
        load: Any = load_generator if kind == "generator" else load_tokenizer
        expected = to_original(load(checkpoint))
        assert key in tensors
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_report(place: Place) -> None:
    place.run(*place.train("training.steps=2"))
    page = place / "run" / "report.html"
    assert place.run("report", place / "run", "--samples", 1) == f"wrote {page}\n"
    text = page.read_text()
    assert "<svg" in text
    assert text.count("data:image/png;base64,") >= 2  # before and after
    assert "va_pi" in text
    assert 'src="http' not in text
    assert "Reconstructions under teacher forcing" in text
    assert "Results" not in text


def test_report_of_what_is_asked_for(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "asked"
    place.run(*place.train("training.steps=1", run="asked"))
    write_result(run / "scores.json", Result("text", {"clip_score": 0.25}, {}, None, None, {}))
    capsys.readouterr()
    asked = ["--classes", "2,0,3", "--samples", 3, "--reconstructions", 0, "--guidance-scale", 2, "--seed", 5]
    assert main([str(word) for word in ("report", run, *asked, "--device", "cpu")]) == 0
    assert "drawing 9 images of 16 pixels, before\ndrawing 9 images of 16 pixels, after" in capsys.readouterr().err
    text = (run / "report.html").read_text()
    assert "Samples are free-running, guidance scale 2.0, seed 5, from the same seeds." in text
    assert "scores.json: Fit to the prompts" in text
    assert "Reconstructions under" not in text
    assert "one prompt a column: a (0), c (2), no class (3)" in text
    for words, message in (
        (("--classes", "4"), "class id 4 is out of range: this generator knows 0 to 2"),
        (("--classes", "a"), "--classes a: expected whole numbers separated by commas"),
        (("--prompt", "a dog"), "the generator is conditioned on classes; ask for classes instead of prompts"),
        (("--samples", "-1"), "--samples is -1; it must be at least 0"),
    ):
        assert message in place.refused("report", run, *words)


def test_report_where_the_data_are_gone(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "moved"
    place.run(*place.train("training.steps=1", run="moved"))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("/images", "/gone"))
    assert main(["report", str(run), "--device", "cpu"]) == 0
    assert "no reconstructions: " in capsys.readouterr().err
    assert "Reconstructions under" not in (run / "report.html").read_text()


def test_doctor(place: Place) -> None:
    said = place.run("doctor")
    assert f"torch  {torch.__version__.partition('+')[0]}" in said
    for line in ("varpi", "python", "processors", "memory", "cuda", "embedded tokenizer", "weights for lpips-vgg"):
        assert f" {line}  " in said


def test_doctor_knows_where_networks_come_from(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    said = place.run("doctor")
    inception = tmp_path / "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    assert f"weights for inception  not at {inception}: downloaded at first use" in said
    homes = {"clip": "openai/clip-vit-base-patch32", "geneval": "facebook/mask2former-swin-small-coco-instance"}
    for name, repo in homes.items():
        assert f"weights for {name}  not in the Hub's cache: hf download {repo}\n" in said
    inception.parent.mkdir(parents=True)
    inception.touch()
    assert f"weights for inception  {inception}\n" in place.run("doctor")


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "recipes",
        "train",
        "sample",
        "evaluate",
        "study",
        "encode",
        "export",
        "push",
        "report",
        "doctor",
        "completion",
    ],
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"usage: varpi {command}" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["trian"])
    assert exit.value.code == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err


# -- checkpoints that cannot be used


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pt", "gone"])
def test_missing_checkpoint(place: Place, name: str) -> None:
    missing = place / name
    assert "no such file or directory" in place.refused(*place.train(f"generator.source={missing}"))
    assert "no such file or directory" in place.refused(*place.train(f"tokenizer.source={missing}"))
    assert "no such file or directory" in place.refused("export", missing, "--output", place / "out.pt")
    command = place.sample("--count", 1)
    command[1] = missing
    assert "no such file or directory" in place.refused(*command)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_checkpoint(place: Place, suffix: str) -> None:
    whole, cut = place / f"whole.{suffix}", place / f"cut.{suffix}"
    export_original(tiny.generator(), whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert f"{cut}: not a readable" in place.refused(*place.train(f"generator.source={cut}"))
    assert f"{cut}: not a readable" in place.refused("export", cut, "--output", place / "out.pt")


def test_wrong_architecture(place: Place) -> None:
    message = place.refused(*place.train("generator.architecture=llamagen-c2i-b"))
    assert "the tensors say vocab_size 32, dim 32, n_layer 2" in message
    assert "architecture 'llamagen-c2i-b' says vocab_size 16384, dim 768, n_layer 12" in message
    message = place.refused(*place.sample("--count", 1, "--architecture", "llamagen-c2i-xx"))
    assert "no generator architecture is called 'llamagen-c2i-xx'; did you mean 'llamagen-c2i-xxl'?" in message
    message = place.refused(*place.sample("--count", 1, "--tokenizer-architecture", "vq-16"))
    assert "codebook_size 32" in message
    message = place.refused(*place.train(f"generator.source={place.pair / 'tokenizer.safetensors'}"))
    assert "holds a tokenizer, not a generator" in message


def test_tokenizer_of_another_vocabulary(place: Place) -> None:
    other = place / "other.safetensors"
    save_tokenizer(tiny.tokenizer(VQConfig(**{**vars(tiny.TOKENIZER), "codebook_size": 16})), other)
    command = place.sample("--count", 1)
    command[3] = other
    for message in (place.refused(*place.train(f"tokenizer.source={other}")), place.refused(*command)):
        assert "the generator's vocabulary has 32 tokens, the tokenizer's codebook 16" in message


class Payload:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_is_not_plain_tensors(place: Place) -> None:
    for name in ("zip.pt", "raw.pt"):
        file = place / name
        content = {"model": Payload(place / "harm")}
        if name == "zip.pt":
            torch.save(content, file)
        else:
            file.write_bytes(pickle.dumps(content, protocol=2))
        for command in (place.train(f"generator.source={file}"), ["export", file, "--output", place / "out.pt"]):
            message = place.refused(*command)
            assert f"{file}: holds posix.mkdir, not only plain tensors, and is refused" in message
    assert not (place / "harm").exists()


# -- what does not fit together


def test_image_size_that_does_not_fit_the_grid(place: Place) -> None:
    message = place.refused(*place.train("data.image_size=32"))
    assert "data.image_size is 32, but a 4x4 grid of tokens decodes to 16 pixels" in message
    assert "image_size is 20, but the generator's grid is 4x4" in place.refused(*place.train("data.image_size=20"))
    message = place.refused(*place.sample("--count", 1, "--image-size", 32))
    assert "image_size is 32, but this pair makes images of 16 pixels" in message
    assert "sides divisible by 4" in place.refused(*place.encode(size=18))


@pytest.mark.parametrize("classes", ["0,4", "-1", "2,1000"])
def test_class_out_of_range(place: Place, classes: str) -> None:
    message = place.refused(*place.sample(f"--classes={classes}"))
    assert f"class id {classes.split(',')[-1]} is out of range: this generator knows 0 to 2" in message


def test_data_of_more_classes_than_the_generator_knows(place: Place) -> None:
    images = tiny.images(place / "images", classes="abcd")
    message = place.refused(*place.train(f"data.source={images}"))
    assert "data.source has 4 classes, but the generator knows 3" in message


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--classes", "one"], "--classes one: expected whole numbers separated by commas"),
        (["--classes", ""], "--classes : expected whole numbers"),
        (["--count", "0"], "the number of images is 0; it must be at least 1"),
        (["--count", "1", "--temperature", "0"], "temperature is 0.0; it must be"),
        (["--count", "1", "--top-p", "1.5"], "top_p is 1.5; it must be"),
        (["--count", "1", "--top-k", "-1"], "top_k is -1; it must be"),
        (["--count", "1", "--guidance-scale", "-1"], "guidance_scale is -1.0; it must be at least 0"),
        (["--count", "1", "--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--count", "1", "--seed", "-5"], "seed is -5; it must be"),
        (["--count", "1", "--resize", "256"], "--resize 256: only 384 to 256 is defined; these images are 16 pixels"),
        (["--count", "1", "--device", "cuda:99"], "device cuda:99: this machine has "),
        (["--count", "1", "--device", "tpu"], "device 'tpu': must be cpu, cuda or cuda:N"),
    ],
)
def test_sampling_settings_out_of_range(place: Place, more: list[str], line: str) -> None:
    assert line in place.refused(*place.sample(*more))


# -- data


def test_data_that_is_not_there(place: Place) -> None:
    for command in (place.train(f"data.source={place / 'gone'}"), place.encode(data=place / "gone")):
        assert f"{place / 'gone'}: no such data" in place.refused(*command)


def test_empty_data(place: Place) -> None:
    (place / "images").mkdir()
    message = place.refused(*place.train(f"data.source={place / 'images'}"))
    assert "no class folders; expected" in message
    (place / "images" / "cat").mkdir()
    for command in (place.train(f"data.source={place / 'images'}"), place.encode(data=place / "images")):
        assert "no images in its class folders" in place.refused(*command)


def test_unreadable_data(place: Place) -> None:
    images = tiny.images(place / "images")
    for path in images.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:30])
    said = place.refused(*place.encode(data=images))
    assert f"{images}: none of its 24 images can be used: 24 unreadable ({images / 'a' / '0.png'}: " in said
    assert not (place / "tokens.safetensors").exists()
    assert main(place.train(f"data.source={images}")) == 2
    said = place.capsys.readouterr().err.splitlines()
    assert sum(line.startswith("varpi train: ") for line in said) == 1
    assert said[-1].startswith("varpi train: too many unreadable images: ")
    assert not (place / "run" / "checkpoints").exists()


def test_data_without_the_split(place: Place) -> None:
    message = place.refused(*place.train("validation.every=1", "validation.split=test"))
    assert "no split 'test'; it has train, val" in message
    assert "no split 'test'" in place.refused(*place.encode("--split", "test"))


# -- recipes


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("method.gruop_size=4", "va_pi.yaml: unknown key method.gruop_size; did you mean group_size?"),
        ("training.steps=lots", "va_pi.yaml: training.steps is 'lots'; it must be a valid integer"),
        ("method.reward.mse_weight=-1", "va_pi.yaml: method.reward.mse_weight is -1; it must be greater than or equal"),
        ("method.group_size=0", "va_pi.yaml: method.group_size is 0; it must be greater than or equal to 1"),
        ("steps", "--set 'steps': expected key.path=value"),
    ],
)
def test_wrong_recipe(place: Place, setting: str, line: str) -> None:
    assert place.refused(*place.train(setting)).startswith(f"varpi train: {line}")


def test_recipe_that_is_not_there(place: Place) -> None:
    message = place.refused("train", "llamagen-c2i-xx", "--output", place / "run")
    assert "did you mean llamagen-c2i-xxl?" in message


# -- outputs that hold something already


def test_output_that_holds_a_run(place: Place) -> None:
    place.run(*place.train("training.steps=1"))
    message = place.refused(*place.train("training.steps=2"))
    assert "already holds a run (at step-00000001); continue it with --resume or choose another --output" in message


def test_output_that_holds_something_else(place: Place) -> None:
    for name in ("run", "samples"):
        (place / name).mkdir()
        (place / name / "thesis.tex").write_text("mine")
    for name in ("tokens.safetensors", "out.pt"):
        (place / name).write_text("mine")
    assert "is not empty and holds no run" in place.refused(*place.train())
    assert "is not empty and holds no run" in place.refused(*place.train(resume=True))
    assert "already holds something; choose another directory" in place.refused(*place.sample("--count", 1))
    assert "already exists; choose another" in place.refused(*place.encode())
    generator = place.pair / "generator.safetensors"
    assert "already exists" in place.refused("export", generator, "--output", place / "out.pt")


@pytest.mark.parametrize("recipe", ["digits-text", "digits-text-next-token"])
def test_a_recipe_whose_base_is_missing_says_what_to_run_first(
    recipe: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    train = ["train", recipe, "--device", "cpu"]
    base = "runs/digits-text-generator"
    message = place.refused(*train)
    assert (
        f"{base} is not there: it is made by another recipe; run `varpi train digits-text-generator` first" in message
    )
    (place / base).mkdir(parents=True)
    message = place.refused(*train)
    assert f"{base} has not been trained to its end: run `varpi train digits-text-generator --resume` first" in message
    (place / base / "model.safetensors").write_text("mine")
    assert "first" not in place.refused(*train)


def test_a_batch_larger_than_the_machine_is_refused_before_it_is_read(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("varpi.runtime.memory.physical_memory", lambda: 2**34)
    message = place.refused(*place.train("training.batch_size=1048576", "data.image_size=256"))
    assert (
        "1048576 images of 256 pixels at once (training.batch_size): 768 GiB are needed, and this machine has 16"
        in (message)
    )


@pytest.mark.parametrize("size", [0, -5, 10**9])
def test_encode_refuses_absurd_sizes(size: int, place: Place) -> None:
    assert f"--image-size is {size}; it must be from 1 to 16384" in place.refused(*place.encode(size=size))


def test_resume_under_another_recipe(place: Place) -> None:
    place.run(*place.train("training.steps=1"))
    message = place.refused(*place.train("training.steps=2", "optimizer.learning_rate=0.5", resume=True))
    assert "is a run of another recipe: optimizer.learning_rate is 0.003 there and 0.5 here" in message


# -- disks


Usage = namedtuple("Usage", "total used free")


def test_no_space_for_a_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known beforehand not to fit is not begun."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 90, 10))
    message = place.refused("export", place.pair / "generator.safetensors", "--output", place / "out.pt")
    assert f"{place / 'out.pt'}: no space left on the disk (" in message
    assert "bytes needed, 10 free); not written" in message


@pytest.mark.machine
def test_a_disk_that_is_really_full(place: Place, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(2 * 2**20))
    for command in (
        [*place.sample("--count", 60), "--output", small_disk / "samples"],
        [*place.encode(), "--output", small_disk / "tokens" / "t.safetensors"],
        ["export", place.pair / "generator.safetensors", "--output", small_disk / "out.pt"],
        [*place.train(), "--output", small_disk / "run"],
    ):
        assert main([str(argument) for argument in command]) == 2
        line = place.capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"varpi {command[0]}: ")
        assert "no space left on" in line.lower(), line
    assert not (small_disk / "out.pt").exists()
    assert not (small_disk / "tokens" / "t.safetensors").exists()


def test_a_place_that_cannot_be_written(place: Place) -> None:
    (place / "file").write_text("")
    message = place.refused(*place.train(), "--output", place / "file" / "run")
    assert "Not a directory" in message


# -- other commands


def test_report_of_what_is_no_run(place: Place) -> None:
    assert "no metrics.jsonl; this is not a run directory" in place.refused("report", place.folder)


def test_evaluate_what_is_not_there(place: Place) -> None:
    assert str(place / "gone") in place.refused("evaluate", place / "gone")


def test_encode_in_batches_of_nothing(place: Place) -> None:
    assert "--batch-size is 0; it must be at least 1" in place.refused(*place.encode("--batch-size", 0))


def test_what_a_run_cost(place: Place) -> None:
    from varpi.report.provenance import costs

    place.run(*place.train("training.steps=3"))
    weights = sum(tensor.numel() for tensor in load_generator(place / "run").state_dict().values())
    found = costs(place / "run")
    assert (found["steps"], found["images"]) == (3, 24)
    assert found["transformer, FLOPs"] == 6 * weights * 16 * 24


def test_the_embedded_pair_brings_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "digits", "--classes", "3", "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert image.size == (32, 32)
    assert capsys.readouterr().err == ""
