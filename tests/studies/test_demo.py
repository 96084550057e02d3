"""The demo, as short as it goes: what it measures and what it leaves behind."""

import json
from pathlib import Path

import pytest
import torch

from varpi.data import open_dataset
from varpi.errors import VarpiError
from varpi.evaluation import measure, summarize
from varpi.networks.judges import embed, load_judge
from varpi.sampling.generate import generate
from varpi.studies.demo import ROWS, _verdict, demo
from varpi.weights import load_generator, load_tokenizer

MEASURED = {"frechet_distance", "precision", "recall", "class_agreement"}


@pytest.mark.timeout(900)  # a minute of processor time
def test_what_a_demo_leaves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = demo(tmp_path / "demo", steps=1, samples=50, seeds=2)
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    rows = {name: metrics[name] for name in ROWS}
    assert set(metrics) == {*rows, "settings"}
    assert {"base", "control", "tuned"} <= set(rows)
    assert all(row.keys() == MEASURED and all(len(pair) == 2 for pair in row.values()) for row in rows.values())
    assert len({row["frechet_distance"][0] for row in rows.values()}) == 7  # seven models, or ways to sample
    assert (metrics["settings"]["samples"], metrics["settings"]["sampling_seeds"]) == (50, [1000, 1001])
    assert metrics["settings"]["steps"] == 1
    assert metrics["settings"]["sampling"]["base_best_temperature"] == {"temperature": 0.8}
    assert metrics["base"] == by_hand(50, (1000, 1001))
    assert metrics["va_pi_guided"] == by_hand(50, (1000, 1001), tmp_path / "demo" / "va_pi", guidance_scale=1.5)
    text = page.read_text()
    assert "varpi demo --steps 1 --samples 50 --seeds 2" in text
    assert text.index("no gain that this run can show") < text.index("Without guidance") < text.index("With guidance,")
    assert text.count('<tr class="of-interest">') == 1
    assert text.count("data:image/") == 4 + 6 + text.count('rel="icon" href="data:image/')  # grids, reconstructions
    assert "trained tuned" in (said := capfd.readouterr().err)
    assert "measured base_best_temperature, seed 1001" in said
    for name in ("control", "va_pi", "tuned"):
        assert (tmp_path / "demo" / name / "model.safetensors").is_file()


def test_the_verdict_follows_the_numbers() -> None:
    def of(tuned: float) -> str:
        results = {"base": [0.42, 0.01], "control": [0.36, 0.02], "tuned": [tuned, 0.02]}
        return _verdict({name: {"frechet_distance": pair} for name, pair in results.items()})

    assert of(0.25).startswith("Fréchet distance without guidance, lower is better: 0.420 ± 0.010 as pretrained")
    assert "a clear gain" in of(0.25)
    assert "no gain that this run can show" in of(0.31)  # within twice the spread of the control
    assert "no gain that this run can show" in of(0.5)


def by_hand(
    count: int, seeds: tuple[int, ...], source: str | Path = "digits", **sampling: float
) -> dict[str, list[float]]:
    """A model's row, in this process, by one thread as in the demo's: sums in another order may change a token."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator, tokenizer, judge = load_generator(source), load_tokenizer("digits"), load_judge()
    digits, classes = open_dataset("digits", image_size=32, split="test"), torch.arange(10).repeat(count // 10)
    real = embed(judge, torch.stack([digits[i].image for i in range(len(digits))]))[0]
    made = [tokenizer.decode(generate(generator, classes, seed=seed, **sampling)) for seed in seeds]
    summary = summarize([measure(images.detach(), classes, judge, real) for images in made])
    torch.set_num_threads(threads)
    return {name: pytest.approx(pair, rel=1e-3, abs=1e-3) for name, pair in summary.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 55}, "--samples is 55; it must be a multiple of 10, at least 50"),
        ({"samples": 40}, "--samples is 40"),
        ({"seeds": 1}, "--seeds is 1; an uncertainty needs at least 2"),
        ({"steps": 0}, "--steps is 0; it must be at least 1"),
        ({"steps": 2**40}, "training.steps"),
    ],
)
def test_a_demo_that_is_refused(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=message):
        demo(tmp_path / "demo", **options)
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(VarpiError, match="holds something that is not a demo"):
        demo(tmp_path, steps=1, samples=50, seeds=2)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
