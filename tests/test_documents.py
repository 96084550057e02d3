"""What README.md and docs/*.md tell people to type is understood, and done on small inputs where these can be made.

A block of commands that stands there and not in this file fails, and so does one that is only here.
"""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_t5
import torch
from PIL import Image

import varpi
from varpi.cli.main import main, make_parser
from varpi.cli.needs import HOMES
from varpi.generators import LlamaGenConfig
from varpi.generators.llamagen_files import SIZES
from varpi.recipe import load_recipe
from varpi.studies.plan import load_study
from varpi.tokenizers import VQConfig
from varpi.training import read_metrics
from varpi.weights import export_original, load_generator

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHER = ["torchrun", "--nproc-per-node", "8", "-m", "varpi"]
TEXT = LlamaGenConfig(dim=32, n_layer=2, n_head=2, vocab_size=64, grid=4, conditioning="text", caption_dim=16)
VQ16 = VQConfig(downsample=16, channels=32, latent_channels=32, codebook_size=16384, encoder_blocks=1, decoder_blocks=1)
VQ4 = VQConfig(**{**asdict(tiny.TOKENIZER), "codebook_size": 64})
"""Of the captions; with it images of 16 pixels have 4x4 tokens."""
SHORT = "--set training.steps=2 --set training.batch_size=2 --set method.group_size=2 --set data.workers=0"

RUN = {
    "varpi doctor llamagen-c2i-xxl --set data.source=/data/imagenet": "varpi doctor llamagen-c2i-xxl "
    "--set data.source=imagenet --set method.reward.perceptual_weight=0",
    "varpi train llamagen-c2i-xxl --output runs/xxl --set data.source=/data/imagenet": "varpi train "
    "llamagen-c2i-xxl --output runs/xxl --set data.source=imagenet --set tokenizer.architecture=null "
    f"--set method.reward.perceptual_weight=0 {SHORT}",
    "varpi export runs/xxl --output c2i_XXL_384_va_pi.pt": "",
    "varpi sample runs/xxl --per-class 50 --output samples --resize 256": "varpi sample runs/xxl --classes 207,360 "
    "--output samples --resize 256",
    "varpi report runs/xxl --device cuda": "varpi report runs/xxl --device cpu --samples 0",
    "varpi doctor": "",
    "varpi train digits --set preview.every=20": "varpi train digits --set preview.every=1 "
    f"--set validation.every=2 --set validation.images=4 --set preview.images=2 {SHORT}",
    "varpi export runs/xxl --card --license mit --base-model FoundationVision/LlamaGen --output xxl": "",
    "varpi encode captions data/laion-coco --output features": "varpi encode captions data/laion-coco "
    "--output features --text-encoder t5",
    "varpi train llamagen-t2i-xl --set data.source=data/laion-coco --set data.caption_features=features "
    "--set generator.text_encoder=null": "varpi train llamagen-t2i-xl --set data.source=data/laion-coco "
    "--set data.caption_features=features --set generator.text_encoder=null --set generator.architecture=t2i.json "
    "--set tokenizer.architecture=vq4.json --set data.image_size=16 --set method.reward.perceptual_weight=0 "
    f"--set data.max_bad_fraction=1 {SHORT}",
    "varpi evaluate runs/xxl --count 50000 --resize 256 --reference VIRTUAL_imagenet256_labeled.npz --cache cache "
    "--json xxl.json": "varpi evaluate runs/xxl --count 12 --resize 256 --reference VIRTUAL_imagenet256_labeled.npz "
    "--cache cache --json xxl.json --metrics precision,recall --weights inception.pth",
    "varpi sample c2i_XXL_384.pt --tokenizer vq_ds16_c2i.pt --image-size 384 --count 50000 --resize 256 "
    "--output base": "varpi sample c2i_XXL_384.pt --tokenizer vq_ds16_c2i.pt --image-size 384 --count 12 --resize 256 "
    "--output base",
    "varpi evaluate base --reference VIRTUAL_imagenet256_labeled.npz --cache cache --json base.json": "varpi evaluate "
    "base --reference VIRTUAL_imagenet256_labeled.npz --cache cache --json base.json --metrics precision,recall "
    "--weights inception.pth",
    "varpi report --compare base=base.json xxl=xxl.json --embeddings inception --output page.html": "varpi report "
    "--compare base=base.json xxl=xxl.json --embeddings inception --weights inception.pth --output page.html",
}
"""Commands, in the order of the pages, and what is done instead; "": the very same."""
UNDERSTOOD = {
    "varpi train llamagen-c2i-xxl --set preview.every=10 --set training.ema=0.99",
    "varpi push runs/xxl me/llamagen-xxl-va-pi --license mit --base-model FoundationVision/LlamaGen",
    "torchrun --nproc-per-node 8 -m varpi sample runs/xxl --per-class 50 --output samples --resize 256",
    "varpi train janus-pro-1b --output runs/janus",
    'varpi sample runs/janus --prompt "a red bicycle on a beach" --guidance-scale 5 --output images',
    "varpi train llamagen-c2i-xxl --dry-run",
    "varpi train llamagen-c2i-xxl --dry-run --device-memory 40",
    "varpi play",
    "varpi play runs/xxl",
    "varpi study shapes-table3",
    "varpi study shapes-table5",
    "varpi study cifar10-table2",
    "varpi study cifar10-table4",
    "varpi study cifar10-figure4",
    "varpi study cifar10-group-size",
    "varpi train shapes",
    "varpi evaluate runs/shapes --kind geneval --captions shapes --limit 600 --guidance-scale 2 --detector shapes",
    "varpi sample runs/janus --prompts drawbench.json --per-prompt 4 --guidance-scale 5 --output drawbench",
    "varpi evaluate drawbench --kind text",
    "varpi sample runs/janus --prompts evaluation_metadata.jsonl --per-prompt 4 --guidance-scale 5 --geneval "
    "--output samples",
    "varpi train cifar10-classifier --set data.source=FOLDER --set data.image_column=image",
    "varpi evaluate samples/geneval --kind geneval --metadata evaluation_metadata.jsonl",
    "varpi evaluate runs/cifar10 --per-class 200 --features efficientnet-lite0 --reference uoft-cs/cifar10 "
    "--reference-split test --reference-column img",
    "varpi evaluate runs/xxl --kind alignment --features inception",
    "varpi study digits --output runs/study --set set.training.steps=10 --set protocol.samples=200",
    "varpi study cifar10-table2 --set data.source=FOLDER --set data.image_column=image",
    "varpi study digits",
}
"""Commands that need eight GPUs, hours, or files from elsewhere, or serve until stopped: their flags, recipes and
studies are read, no more."""


def blocks(page: Path) -> Iterator[str]:
    """What stands indented by four or more after an empty line, or between fences."""
    text = page.read_text(encoding="utf-8")
    yield from re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"(?:\A|\n\n)((?: {4}.*(?:\n|\Z))+(?:\n* {4}.*(?:\n|\Z))*)", text)


BLOCKS = [(page.name, block) for page in PAGES for block in blocks(page)]


def kind(page: str, block: str) -> str:
    first = block.split()[0]
    if first in ("make", "pip", "hf", "varpi", "torchrun", "--set"):
        return "commands"
    if first in ("import", "from"):
        return "python"
    if first == "src/varpi/":
        return "map"
    assert (page, first) == ("log.md", "##"), f"{page}: a block that no test knows:\n{block}"
    return "form"


def commands() -> list[str]:
    """One each, without comments; settings alone are those of a recipe of one's own."""
    found = []
    for page, block in BLOCKS:
        if kind(page, block) == "commands":
            for line in block.replace("\\\n", " ").splitlines():
                for words in " ".join(shlex.split(line, comments=True, posix=False)).split(" && "):
                    found += [words] if words else []
    return found


COMMANDS = commands()
OURS = [command for command in COMMANDS if command.split()[0] in ("varpi", "torchrun")]


def arguments(command: str) -> list[str]:
    words = shlex.split(command)
    return words[len(LAUNCHER) :] if words[0] == "torchrun" else words[1:]


def test_every_command_is_known() -> None:
    assert len(COMMANDS) > 20
    assert set(OURS) == {*RUN, *UNDERSTOOD}
    assert not {*RUN} & UNDERSTOOD
    assert all(shlex.split(command)[: len(LAUNCHER)] == LAUNCHER for command in OURS if command[:8] == "torchrun")


@pytest.mark.parametrize("command", OURS)
def test_it_is_understood(command: str) -> None:
    options = make_parser().parse_args(arguments(command))
    if options.command == "train":
        assert load_recipe(options.recipe, options.settings).training.steps
    elif options.command == "study":
        assert load_study(options.study, options.settings)[0].variants


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in OURS])
def test_what_is_not_ours_is_there(command: str) -> None:
    match shlex.split(command, comments=True):
        case ["make", target]:
            assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0
        case ["pip", "install", "-e", what]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
            assert asked is not None
            assert not asked[1] or {*asked[1].split(",")} <= {*extras}
        case ["hf", "download", repository, *files, "--local-dir", "."]:
            assert files
            assert all(
                any(name.startswith(one) and home == repository for one, home in HOMES.items()) for name in files
            )
        case ["--set", *_] as settings:
            assert load_recipe("digits", settings[1::2]).method.name == "va_pi"
        case _:
            pytest.fail(f"nothing is known of {command}")


def test_the_map_names_what_is_there() -> None:
    (drawn,) = [block for page, block in BLOCKS if kind(page, block) == "map"]
    inside: set[str] = set()
    for line in drawn.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        where = ROOT / "src/varpi" / name if depth > 2 else ROOT / name
        assert where.is_dir() == name.endswith("/"), name
        assert where.exists(), name
        inside |= {name.strip("/")} if depth > 2 else set()
    rooms = {path.name for path in (ROOT / "src/varpi").iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert rooms - inside == {"recipes", "embedded"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small files under the names that the pages give theirs, and a LlamaGen-XXL of two layers."""
    folder = tmp_path_factory.mktemp("bench")
    config = LlamaGenConfig(dim=32, n_layer=2, n_head=2, grid=24)
    export_original(tiny.generator(config), folder / "c2i_XXL_384.pt")
    export_original(tiny.tokenizer(VQ16), folder / "vq_ds16_c2i.pt")
    for split in ("train", "val"):
        tiny.photographs(folder / "imagenet" / split, ((500, 375), (375, 500), (400, 400), (600, 400)))
    export_original(tiny.generator(TEXT), folder / "t2i_XL_stage1_256.pt")
    export_original(tiny.tokenizer(VQ4), folder / "vq_ds16_t2i.pt")
    for name, fields in (("t2i", TEXT), ("vq4", VQ4)):
        (folder / f"{name}.json").write_text(json.dumps(asdict(fields)))
    tiny_t5.make(folder / "t5", ("a", "red", "cat"))
    _captions(folder / "data/laion-coco/00000.tar")
    images = np.random.default_rng(0).integers(256, size=(12, 256, 256, 3), dtype=np.uint8)
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=images)
    _inception(folder / "inception.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "xxl", (config.n_layer, config.dim, config.n_head))
        patch.chdir(folder)
        yield folder
    shutil.rmtree(folder)


def _inception(path: Path) -> None:
    """Random weights: for what is done with features, not for what they mean."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    unfilled = type("Unfilled", (module.FeatureExtractorInceptionV3,), {"load_state_dict": lambda self, _: None})
    torch.save({}, path)
    network = unfilled("inception", ["2048"], feature_extractor_weights_path=path)
    torch.save(network.state_dict(), path)


def _captions(path: Path) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as shard:
        for i in range(4):
            png = io.BytesIO()
            Image.new("RGB", (20, 20), (60 * i, 30, 200)).save(png, "png")
            for name, content in ((f"{i}.png", png.getvalue()), (f"{i}.txt", b"a red cat")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def done(bench: Path) -> dict[str, str]:
    """What each command that could not be carried out said, in the order of the pages: later ones need earlier ones."""
    trouble = {}
    for documented, instead in RUN.items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = main(arguments(instead or documented))
        if code:
            trouble[documented] = said.getvalue()
    return trouble


@pytest.mark.parametrize("command", RUN)
def test_it_does_what_it_says(command: str, done: dict[str, str]) -> None:
    assert command not in done, done[command]
    options = make_parser().parse_args(arguments(command))
    written = getattr(options, "output", None) or getattr(options, "json", None)
    if options.command == "train":
        rows = read_metrics(Path(written or f"runs/{options.recipe}"))
        assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    elif written is not None:
        assert Path(written).exists()


def test_the_exported_file_is_what_llamagen_reads(done: dict[str, str]) -> None:
    before, after = (torch.load(name, weights_only=True) for name in ("c2i_XXL_384.pt", "c2i_XXL_384_va_pi.pt"))
    assert {name: value.shape for name, value in after.items()} == {name: t.shape for name, t in before.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_python_of_the_readme(bench: Path) -> None:
    (code,) = [block for page, block in BLOCKS if kind(page, block) == "python"]
    (bench / "block.py").write_text(code)
    made = runpy.run_path(str(bench / "block.py"))
    assert made["images"].shape == (2, 3, 384, 384)
    generator = load_generator("c2i_XXL_384.pt", image_size=384)
    assert torch.equal(made["tokens"], varpi.generate(generator, [207, 360], guidance_scale=1.75, seed=0))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
