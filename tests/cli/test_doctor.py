"""`varpi doctor RECIPE` says what is missing and where it is, and `varpi completion` knows every command."""

import shutil
import subprocess
from pathlib import Path

import pytest
import tiny

from varpi.cli import needs
from varpi.cli.main import COMMANDS, main
from varpi.cli.needs import needs_of
from varpi.recipe import Recipe, load_recipe
from varpi.weights import load_generator


def found(recipe: Recipe) -> dict[str, tuple[bool | None, str]]:
    return {need.what: (need.there, need.finding) for need in needs_of(recipe)}


def test_what_a_released_model_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = found(load_recipe("llamagen-c2i-xxl"))
    room = ("memory", "disk")  # of which this machine may have little
    assert [what for what, (there, _) in before.items() if not there and what not in room] == [
        "generator.source", "tokenizer.source", "weights of lpips-vgg", "data.source",
    ]  # fmt: skip
    assert "hf download FoundationVision/LlamaGen c2i_XXL_384.pt --local-dir ." in before["generator.source"][1]
    assert "for 1411 million weights" in before["memory"][1]
    for name in ("c2i_XXL_384.pt", "vq_ds16_c2i.pt", "hub/checkpoints/vgg16-397923af.pth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for split, names in (("train", ("n01", "n02")), ("val", ("n01", "n02"))):
        said = found(load_recipe("llamagen-c2i-xxl"))["data.source"]
        assert said[0] is False
        for name in names:
            (tmp_path / "data/imagenet" / split / name).mkdir(parents=True)
        said = found(load_recipe("llamagen-c2i-xxl"))["data.source"]
        assert said[1].startswith(
            f"data/imagenet/{split}: no class folders with images; expected data/imagenet/{split}/"
        )
        (tmp_path / "data/imagenet" / split / "n02/a.JPEG").touch()
    after = found(load_recipe("llamagen-c2i-xxl"))
    assert all(after[what][0] for what in ("generator.source", "tokenizer.source", "data.source"))
    assert after["weights of lpips-vgg"] == (True, str(tmp_path / "hub/checkpoints/vgg16-397923af.pth"))


def test_memory_and_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes a weight, 20 with an average; checkpoints of 12 or 16, one more than are kept, and the model."""
    count = needs._trained(load_recipe("llamagen-c2i-xl"))
    assert count is not None
    for ema, state, kept in (("null", 16, 12), ("0.99", 20, 16)):
        recipe = load_recipe("llamagen-c2i-xl", [f"training.ema={ema}", "training.keep=3"])
        for spare in (-1, 1):
            monkeypatch.setattr(needs, "_memory", lambda spare=spare, state=state: (count * state + spare, "here"))
            free = shutil._ntuple_diskusage(0, 0, count * (4 * kept + 4) + spare)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: free)
            assert found(recipe)["memory"][0] == (spare > 0)
            assert found(recipe)["disk"][0] == (spare > 0)


@pytest.mark.parametrize(
    ("setting", "what", "finding"),
    [
        (
            "generator.source=runs/digits-generator",
            "generator.source",
            "made by another recipe: varpi train digits-gen",
        ),
        ("tokenizer.source=gone/deep/x.pt", "tokenizer.source", "gone/deep/x.pt is not here"),
        ("data.source=gone", "data.source", "gone is not here: --set data.source=YOURS"),
        ("data.caption_features=gone", "data.caption_features", "varpi encode captions"),
        ("logging.wandb=mine", "extra wandb", "pip install 'varpi[wandb]'"),
    ],
)
def test_what_is_missing(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, what: str, finding: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    there = found(tiny.recipe(pair))
    assert all(one for one, _ in there.values())
    missing = {name: why for name, (one, why) in found(tiny.recipe(pair, setting)).items() if not one}
    assert list(missing) == [what]
    assert finding in missing[what]


def test_what_would_be_downloaded(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    settings = ("generator.source=me/there", "data.source=me/photos", "method.reward.perceptual_weight=1")
    needs = found(tiny.recipe(pair, *settings))
    for what, finding in (
        ("generator.source", "me/there is not in the Hub's cache: downloaded, or by hf download me/there"),
        ("data.source", "me/photos is not here: downloaded as a dataset of the Hub, or --set data.source=YOURS"),
        ("weights of lpips-vgg", "downloaded at first use, or put there"),
    ):
        assert needs[what][0] is None
        assert finding in needs[what][1]
    named = found(tiny.recipe(pair, *settings[2:], f"method.reward.perceptual_weights={tmp_path / 'none.pth'}"))
    assert named["weights of lpips-vgg"][0] is False


def test_the_weights_of_an_embedded_pair_are_counted() -> None:
    generator = load_generator("cifar10")
    assert needs._trained(load_recipe("cifar10")) == sum(parameter.numel() for parameter in generator.parameters())


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "digits"]) == 0
    said = capsys.readouterr().out
    assert "     ok  generator.source: digits, in the package\n" in said
    assert "MISSING" not in said
    assert main(["doctor", "digits", "--set", "data.source=gone"]) == 2
    assert capsys.readouterr().err == "varpi doctor: 1 of 5 things that digits needs are missing\n"
    assert main(["doctor", "--set", "seed=1"]) == 2
    assert "--set is for a RECIPE" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in COMMANDS:
        assert command.__name__.rsplit(".", 1)[1] in script
    for word in ("--print-recipe", "--guidance-scale", "llamagen-c2i-xxl"):
        assert word in script
    if shell == "bash":
        (tmp_path / "varpi.bash").write_text(script)
        assert subprocess.run(["bash", "-n", tmp_path / "varpi.bash"]).returncode == 0
