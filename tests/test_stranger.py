"""A stranger's path, as the README has it, from a clone to weights that LlamaGen's own code loads; each part timed.

python -m pytest -m slow -s tests/test_stranger.py
VARPI_LLAMAGEN=CHECKOUT python -m pytest -m slow -s tests/test_stranger.py    # loads them in LlamaGen's own class
VARPI_WHOLE_DEMO=1 …                                                          # the demo as it is, five minutes
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from browser import open_browser

from varpi.generators import LlamaGen, LlamaGenConfig
from varpi.tokenizers import VQConfig
from varpi.weights import export_original, load_generator

ROOT = Path(__file__).parents[1]
GENERATOR = LlamaGenConfig(dim=64, n_layer=2, n_head=2, grid=8)
TOKENIZER = VQConfig(
    downsample=16, channels=32, latent_channels=32, codebook_size=16384, encoder_blocks=1, decoder_blocks=1
)
PHOTOGRAPHS = 47
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone to clone"),
]


@pytest.fixture
def timed() -> Iterator[Any]:
    """Times the parts; says how long each took."""
    found: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        found[name] = time.monotonic() - begun

    yield part
    print("\n" + "\n".join(f"{seconds:7.1f} s  {name}" for name, seconds in found.items()))


def test_from_a_clone_to_llamagen(tmp_path: Path, timed: Any) -> None:
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(clone / "src")}

    def varpi(command: str, cwd: Path = home) -> str:
        ran = subprocess.run(
            [sys.executable, "-m", "varpi", *shlex.split(command)],
            cwd=cwd, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, (command, ran.stderr[-2000:])
        return ran.stdout + ran.stderr

    with timed("clone"):
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    with timed("make demo"):
        # `make` would make an environment first: what it then runs, in the one that is here.
        told = subprocess.run(["make", "-n", "demo"], cwd=clone, capture_output=True, text=True, check=True).stdout
        assert re.search(r"^\.venv/bin/varpi demo *$", told, re.MULTILINE)
        varpi("demo" if os.environ.get("VARPI_WHOLE_DEMO") else "demo --steps 2 --samples 50", cwd=clone)
    with open_browser(tmp_path / "profile") as browser:

        def look(page: Path, *expected: str) -> None:
            seen = browser.visit(page.as_uri())
            seen.wait("document.readyState == 'complete' && document.images.length")
            assert all(word in seen.text() for word in expected), seen.text()[:500]
            assert seen.console == []
            assert {url.partition(":")[0] for url in seen.requests} <= {"file", "data"}
            seen.close()

        with timed("its page"):
            look(clone / "runs/demo/report.html", "VA-π on the embedded digits", "Fréchet distance")
            assert (clone / "runs/demo/before-after.png").is_file()
        with timed("varpi play, an image"):
            server = subprocess.Popen(
                [sys.executable, "-m", "varpi", "play", "--port", "0"],
                cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert server.stdout is not None
            try:
                address = next(
                    found[0] for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line))
                )
                page = browser.visit(address)
                page.wait("document.documentElement.dataset.alive")
                page.click("document.querySelector('#generate')")
                page.wait("document.querySelector('#drawn-status').innerText.startsWith('Done')", 120)
                page.close()
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(60)
        with timed(f"training on {PHOTOGRAPHS} photographs"):
            sizes = [(200 + 7 * i, 420 - 5 * i) for i in range(PHOTOGRAPHS)]
            tiny.photographs(home / "photographs", sizes)
            torch.manual_seed(0)
            export_original(LlamaGen(GENERATOR), home / "c2i.pt")
            export_original(tiny.tokenizer(TOKENIZER), home / "vq.pt")
            (home / "c2i.json").write_text(json.dumps(asdict(GENERATOR)))
            varpi(
                "train llamagen-c2i-xl --output mine --set generator.source=c2i.pt "
                "--set generator.architecture=c2i.json --set tokenizer.source=vq.pt --set tokenizer.architecture=null "
                "--set data.source=photographs --set data.image_size=128 --set data.workers=0 --set validation=null "
                "--set training.steps=4 --set training.batch_size=4 --set method.group_size=2 "
                "--set method.reward.perceptual_weight=0 --set preview.every=2 --set preview.images=2 "
                "--set preview.split=train"
            )
        with timed("its previews"):
            assert len([*(home / "mine/previews").glob("*.png")]) == 3
            look(home / "mine/live.html", "mine")
        with timed("its report"):
            varpi("report mine --device cpu")
            look(home / "mine/report.html", "va_pi · mine", "Original")
    with timed("export with a card"):
        varpi("export mine --card --license mit --base-model FoundationVision/LlamaGen --output given")
        assert "before-after.png" in (home / "given/README.md").read_text()
    if checkout := os.environ.get("VARPI_LLAMAGEN"):
        with timed("LlamaGen's own class"):
            _loads_in(Path(checkout), home)


def _loads_in(checkout: Path, home: Path) -> None:
    """What was exported has every key of LlamaGen's transformer, and gives the logits that ours gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(checkout)
        from autoregressive.models.gpt import ModelArgs, Transformer  # pyright: ignore[reportMissingImports]
    theirs = Transformer(
        ModelArgs(
            dim=GENERATOR.dim,
            n_layer=GENERATOR.n_layer,
            n_head=GENERATOR.n_head,
            vocab_size=GENERATOR.vocab_size,
            block_size=GENERATOR.grid**2,
            num_classes=GENERATOR.num_classes,
            cls_token_num=1,
            model_type="c2i",
        )
    ).eval()
    theirs.load_state_dict(torch.load(home / "given/llamagen.pt", weights_only=True))
    ours: Any = load_generator(home / "given/model.safetensors")
    tokens, classes = torch.randint(GENERATOR.vocab_size, (2, GENERATOR.grid**2)), torch.tensor([7, 207])
    with torch.no_grad():
        logits, _ = theirs(idx=tokens[:, :-1], cond_idx=classes, input_pos=torch.arange(tokens.shape[1]))
        torch.testing.assert_close(logits, ours.eval().logits(tokens, classes), atol=2e-4, rtol=1e-4)
