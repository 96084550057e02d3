"""Text-to-image from end to end: captions in the layouts of the field, through the command line, to a checkpoint."""

import io
import json
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_t5
import torch
import yaml
from cases import WHICH, caption_case
from PIL import Image
from training_runs import crash, numbers, quiet, same, weights

from varpi.cli.main import main
from varpi.data.text_encoder import TextEncoder
from varpi.errors import VarpiError
from varpi.methods import build_method
from varpi.recipe import Recipe, load_recipe
from varpi.sampling.generate import generate
from varpi.training.state import checkpoints
from varpi.weights import load_generator, save_generator, save_tokenizer

WORDS = ("a", "photo", "of", "red", "green", "blue", "large", "small", "dog", "cat")
CAPTIONS = [f"A photo of a {size} {color} {what}" for size in WORDS[6:8] for color in WORDS[3:6] for what in WORDS[8:]]
GENERATOR = replace(tiny.GENERATOR, conditioning="text", condition_tokens=10, caption_dim=16)


def jpeg(index: int, side: int = 24) -> bytes:
    draws = torch.Generator().manual_seed(index)
    blocks = torch.randint(256, (4, 4, 3), generator=draws, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks.numpy()).resize((side + 8, side), 0).save(file, "jpeg", quality=95)
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random text-conditional pair, its T5, two tar shards and a recipe. Read only."""
    folder = tmp_path_factory.mktemp("text")
    save_generator(tiny.generator(GENERATOR), folder / "generator.safetensors")
    save_tokenizer(tiny.tokenizer(), folder / "tokenizer.safetensors")
    tiny_t5.make(folder / "t5", WORDS)
    for shard in range(2):
        members = {}
        for i in range(6):
            number = 6 * shard + i
            members[f"{number:04d}.jpg"] = jpeg(number)
            if shard:
                members[f"{number:04d}.txt"] = CAPTIONS[number].encode()
            else:
                members[f"{number:04d}.json"] = json.dumps({"caption": CAPTIONS[number], "width": 32}).encode()
        tar(folder / "shards" / f"{shard:05d}.tar", members)
    values: dict[str, Any] = {
        "method": {"name": "va_pi", "group_size": 4, "context_noise": 0.5, "reward": {"perceptual_weight": 0}},
        "generator": {"source": str(folder / "generator.safetensors"), "text_encoder": str(folder / "t5")},
        "tokenizer": {"source": str(folder / "tokenizer.safetensors")},
        "data": {"source": str(folder / "shards"), "image_size": tiny.IMAGE_SIZE},
        "optimizer": {"learning_rate": 3e-3},
        "training": {"steps": 4, "batch_size": 8, "save_every": 2},
        "seed": 5,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder


def recipe(text: Path, *settings: str) -> Recipe:
    return load_recipe(text / "recipe.yaml", list(settings))


def shell(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def train(text: Path, run: Path, *settings: str) -> int:
    chosen = [part for setting in settings for part in ("--set", setting)]
    return shell("train", text / "recipe.yaml", "--output", run, "--device", "cpu", *chosen)


# -- from captions to a checkpoint


def test_tar_shards_train_sample_export_and_load(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(text, run) == 0
    rows = [row for row in numbers(run) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["ratio_mean"] == 1
    assert not same(weights(run), {**tiny.generator(GENERATOR).state_dict()})

    asked = ["--prompt", "a red dog", "--prompt", "a small blue cat", "--per-prompt", 2, "--seed", 3]
    assert shell("sample", run, *asked, "--guidance-scale", 3, "--output", tmp_path / "images") == 0
    record = json.loads((tmp_path / "images" / "sample.json").read_text())
    assert record["prompts"] == ["a red dog", "a red dog", "a small blue cat", "a small blue cat"]
    assert np.load(tmp_path / "images" / "samples.npz")["arr_0"].shape == (4, 16, 16, 3)

    assert shell("report", run, "--samples", 1, "--device", "cpu") == 0
    page = (run / "report.html").read_text()
    assert "A photo of a" in page
    assert "one prompt a column" in page

    assert shell("export", run, "--output", tmp_path / "t2i.pt") == 0
    exported = torch.load(tmp_path / "t2i.pt", weights_only=True)
    assert exported["cls_embedding.uncond_embedding"].shape == (10, 16)
    tuned: Any = load_generator(run)
    again: Any = load_generator(tmp_path / "t2i.pt", architecture=GENERATOR)
    encoder = TextEncoder(text / "t5", max_tokens=10)
    condition = tuned.prepare_condition(encoder(["a green cat"]))
    tokens = generate(tuned, condition, seed=0)
    assert torch.equal(generate(again, condition, seed=0), tokens)
    assert torch.equal(again.logits(tokens, condition), tuned.logits(tokens, condition))


def test_resume_equals_no_interruption(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quiet(recipe(text), tmp_path / "whole")
    crash(monkeypatch, recipe(text), tmp_path / "cut", 3)
    assert checkpoints(tmp_path / "cut")[0].name == "step-00000002"
    resumed = quiet(recipe(text), tmp_path / "cut", resume=True)
    assert same(weights(whole), weights(resumed))
    assert numbers(whole) == numbers(resumed)


@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_features_encoded_beforehand(form: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They train as captions do that are encoded on the way, up to bfloat16."""
    encode = ["encode", "captions", text / "shards", "--text-encoder", text / "t5", "--max-tokens", 10]
    assert shell(*encode, "--format", form, "--device", "cpu", "--output", tmp_path / "features") == 0
    assert "wrote the features of 12 captions" in capsys.readouterr().out
    assert (tmp_path / "features" / "00001" / f"0006.{form}").is_file()
    assert shell(*encode, "--format", form, "--device", "cpu", "--output", tmp_path / "features") == 0
    assert "wrote the features of 0 captions" in capsys.readouterr().out

    settings = (f"data.caption_features={tmp_path / 'features'}", "generator.text_encoder=null", "training.steps=2")
    assert train(text, tmp_path / "run", *settings) == 0
    assert train(text, tmp_path / "encoded", "training.steps=2") == 0
    one, other = (numbers(tmp_path / name)[0]["cross_entropy"] for name in ("run", "encoded"))
    assert one == pytest.approx(other, abs=0.01)


def flux(path: Path, rows: list[tuple[str | None, str | None, bytes]]) -> Path:
    """A parquet file with the columns of FLUX-Reason-6M."""
    pq.write_table(
        pa.table(
            {
                "id": [str(i) for i in range(len(rows))],
                "image": [{"bytes": image, "path": None} for _, _, image in rows],
                "caption_original": [original for original, _, _ in rows],
                "caption_detail": [detail for _, detail, _ in rows],
                "score_original": [8] * len(rows),
            }
        ),
        path,
    )
    return path


FLUX = 'data.caption_column=["caption_original", "caption_detail"]'


@pytest.mark.parametrize("stream", [False, True])
def test_parquet_with_the_columns_of_flux_reason(
    stream: bool, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows without a caption, or with too small an image, are left out and counted, not trained on."""
    good = [(CAPTIONS[i] if i % 2 else None, CAPTIONS[i], jpeg(i)) for i in range(10)]
    bad: list[tuple[str | None, str | None, bytes]] = [(None, "  ", jpeg(10)), ("a dog", None, jpeg(11, side=9))]
    file = flux(tmp_path / "flux.parquet", good + bad)
    settings = (f"data.source={file}", FLUX, f"data.stream={str(stream).lower()}", "training.steps=4")
    assert train(text, tmp_path / "run", *settings) == 0
    assert len(numbers(tmp_path / "run")) == 4
    where = f"{file}[train]" if not stream else f"{file}[train] file 0"
    line = caplog.records[-1].getMessage()
    assert re.match(rf"{file}: left out \d+ of \d+ images: ", line)
    assert re.search(rf"\d+ without a usable caption \({re.escape(where)} row 10: no caption in", line)
    assert re.search(rf"\d+ too small \({re.escape(where)} row 11: 17x9 pixels; ", line)


@pytest.mark.parametrize("which", WHICH)
def test_captions_that_cleaning_empties(
    which: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """They are neither trained on, nor sampled, nor encoded."""
    file = caption_case(which, "empty-after-cleaning.jsonl", tmp_path / "data")
    reason = "with a caption of which cleaning leaves nothing"

    def last() -> str:
        return caplog.records[-1].getMessage()

    def counted(what: str) -> tuple[int, int]:
        pattern = rf"{file}: left out (\d+) of (\d+) {what}: \1 {reason} \({file}:\d: cleaning leaves nothing of .*\)"
        found = re.fullmatch(pattern, last())
        assert found is not None
        return int(found[1]), int(found[2])

    assert train(text, tmp_path / "run", f"data.source={file}", "training.steps=2") == 0
    gone, opened = counted("images")
    assert opened == 16 + gone > 16
    capsys.readouterr()

    encode = ["encode", "captions", file, "--text-encoder", text / "t5", "--device", "cpu", "--output"]
    assert shell(*encode, tmp_path / "features") == 0
    assert counted("captions") == (4, 5)
    assert (
        capsys.readouterr().out
        == f"wrote the features of 1 captions to {tmp_path / 'features'}; 0 were there already\n"
    )
    assert sorted(path.name for path in (tmp_path / "features").rglob("*.*")) == ["0.npy", "encoder.json"]
    features = (f"data.caption_features={tmp_path / 'features'}", "generator.text_encoder=null")
    assert train(text, tmp_path / "other", f"data.source={file}", *features, "training.steps=2") == 0
    assert re.match(rf"{file}: left out \d+ of \d+ images: \d+ without caption features \({file}:\d: no", last())

    sample = ["sample", tmp_path / "run", "--device", "cpu", "--output"]
    assert shell(*sample, tmp_path / "images", "--captions", file, "--caption-split", "train") == 0
    assert json.loads((tmp_path / "images" / "sample.json").read_text())["prompts"] == ["a red cat"]
    assert last().startswith(f"--captions {file}: left out 4 of 5 captions: 4 {reason} ({file}:2: ")
    (tmp_path / "prompts.txt").write_text("a red dog\nfree shipping\n")
    assert shell(*sample, tmp_path / "more", "--prompts", tmp_path / "prompts.txt") == 2
    assert "varpi sample: prompt 1: cleaning leaves nothing of the caption 'free" in capsys.readouterr().err


def test_photographs_in_a_tar(text: Path, tmp_path: Path) -> None:
    sizes = [(500, 375 + i) for i in range(9)]
    members = {}
    for i, photograph in enumerate(sorted(tiny.photographs(tmp_path / "photographs", sizes).rglob("*.JPEG"))):
        members |= {f"{i:09d}.jpg": photograph.read_bytes(), f"{i:09d}.txt": CAPTIONS[i % 12].encode()}
    tar(tmp_path / "00000.tar", members)
    assert train(text, tmp_path / "run", f"data.source={tmp_path / '00000.tar'}", "training.steps=2") == 0
    assert len(numbers(tmp_path / "run")) == 2


# -- what is refused


def refused(text: Path, run: Path, capsys: pytest.CaptureFixture[str], *settings: str) -> str:
    """One line, and nothing written."""
    assert train(text, run, *settings) == 2
    said = capsys.readouterr().err
    assert not run.exists()
    return said.strip().splitlines()[-1]


def test_captions_without_an_encoder(text: Path, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match="captions need a text encoder, for this generator reads caption features"):
        quiet(recipe(text, "generator.text_encoder=null"), tmp_path / "run")


def test_captions_of_classes(pair: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode = ["encode", "captions", pair / "images", "--text-encoder", text / "t5", "--device", "cpu"]
    assert shell(*encode, "--output", tmp_path / "features") == 2
    assert "it has classes, not captions; try --caption-column" in capsys.readouterr().err


def test_the_frozen_start_has_no_encoder_of_its_own(text: Path) -> None:
    method: Any = build_method(recipe(text, "method.prior=kl"), None, "cpu")
    assert method.model.text_encoder is not None
    assert method.reference.text_encoder is None


def test_features_of_another_encoder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_t5.make(tmp_path / "wide", WORDS, width=24)
    encode = ["encode", "captions", text / "shards", "--text-encoder", tmp_path / "wide", "--device", "cpu"]
    assert shell(*encode, "--output", tmp_path / "features") == 0
    features = (f"data.caption_features={tmp_path / 'features'}", "generator.text_encoder=null")
    with pytest.raises(VarpiError, match=r"caption features have shape \(\d+, 24\); this generator needs \(L, 16\)"):
        quiet(recipe(text, *features), tmp_path / "run")
    said = refused(text, tmp_path / "other", capsys, f"generator.text_encoder={tmp_path / 'wide'}")
    assert "its features have width 24, but the generator reads 16" in said


def test_features_that_are_too_long(text: Path, tmp_path: Path) -> None:
    features = [torch.zeros(11, 16)]
    with pytest.raises(VarpiError, match=r"shape \(11, 16\); this generator needs \(L, 16\) with L from 1 to 10"):
        tiny.generator(GENERATOR).prepare_condition(features)


def test_a_tar_cut_short(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (text / "shards" / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: len(whole) // 2])
    said = refused(text, tmp_path / "run", capsys, f"data.source={tmp_path / '00000.tar'}")
    assert "00000.tar" in said
    assert "cut short" in said


def test_classes_for_a_generator_of_captions(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tiny.images(tmp_path / "images")
    said = refused(text, tmp_path / "run", capsys, f"data.source={images}")
    assert "the generator is conditioned on text, but data.source gives classes; set data.caption_column" in said


def test_sampling_asks_for_what_the_generator_knows(
    text: Path, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(folder: Path, *more: object) -> str:
        models = [folder / "generator.safetensors", "--tokenizer", folder / "tokenizer.safetensors"]
        assert shell("sample", *models, "--output", tmp_path / "images", *more) == 2
        return capsys.readouterr().err

    assert "conditioned on text: give --prompt, --prompts or --captions" in sample(text, "--count", 2)
    assert "captions need a text encoder" in sample(text, "--prompt", "a dog")
    assert "this generator is conditioned on classes" in sample(pair, "--prompt", "a dog")
    assert not (tmp_path / "images").exists()


def test_files_of_prompts(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"tag": "x", "prompt": "a red dog"}\n\n{"text": "a cat"}\n')
    models = [text / "generator.safetensors", "--tokenizer", text / "tokenizer.safetensors"]
    command = ["sample", *models, "--text-encoder", text / "t5", "--output", tmp_path / "images"]
    assert shell(*command, "--prompts", tmp_path / "prompts.jsonl", "--limit", 1) == 0
    assert json.loads((tmp_path / "images" / "sample.json").read_text())["prompts"] == ["a red dog"]
    for content, line in {
        '{"prompt": "a"}\n{"prompt": " "}\n': "line 2: has no prompt",
        "{'prompt'}\n": "line 1: is not JSON",
        "\n": "holds no prompt",
    }.items():
        (tmp_path / "bad.jsonl").write_text(content)
        assert shell(*command[:-1], tmp_path / "more", "--prompts", tmp_path / "bad.jsonl") == 2
        assert line in capsys.readouterr().err
