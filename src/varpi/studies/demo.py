"""The main job from end to end on the embedded digits: evaluate, post-train, evaluate again, write it all down.

Beside VA-π, in the paper's form and in the best setting that is known here, stand the control (cross-entropy alone:
same images, order, steps and learning rate) and what costs no training: the base at another temperature and with
guidance. Everything is reported on the test split, which no model saw, by a judge that took no part in training.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from varpi.data import open_dataset
from varpi.errors import VarpiError
from varpi.evaluation import measure, summarize
from varpi.networks.convnet import SmallConvNet
from varpi.networks.judges import embed, load_judge
from varpi.recipe import load_recipe
from varpi.report import Page, TableRow, write_page
from varpi.report.examples import decode_in_parts, draw_samples, reconstructions
from varpi.report.pictures import PICTURE, before_after
from varpi.report.provenance import costs, environment
from varpi.report.tables import ResultTable, table
from varpi.sampling.generate import generate
from varpi.sampling.settings import Sampling
from varpi.studies.jobs import open_pool
from varpi.tokenizers import Tokenizer
from varpi.training import read_metrics, train
from varpi.weights import load_generator, load_tokenizer

FIRST_SEED = 1000
MARK = "demo.json"
"""What lies in a folder that a demo made."""


@dataclass(frozen=True)
class DemoModel:
    label: str
    recipe: str
    note: str
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DemoRow:
    label: str
    note: str
    model: str | None = None
    """A name in `MODELS`; None for the base."""
    sampling: dict[str, float] = field(default_factory=dict)


MODELS = {
    "tuned": DemoModel("VA-π, best setting", "digits-best", "first-order reward of 2 samples an image, guided prior"),
    "va_pi": DemoModel("VA-π", "digits", "the paper's form, 8 samples an image", ("method.group_size=8",)),
    "control": DemoModel("Cross-entropy alone", "digits-next-token", "the control"),
}
"""What is trained, the longest first."""

TEMPERATURE = 0.8
GUIDANCE = {"base": 2.0, "va_pi": 1.5}
"""The best on the validation split, of those that `varpi study digits` tries."""

ROWS = {
    "base": DemoRow("Base", "as pretrained, temperature 1, no guidance"),
    "base_best_temperature": DemoRow(
        f"Base, temperature {TEMPERATURE}", "the best on validation digits", None, {"temperature": TEMPERATURE}
    ),
    "control": DemoRow(MODELS["control"].label, MODELS["control"].note, "control"),
    "va_pi": DemoRow(MODELS["va_pi"].label, MODELS["va_pi"].note, "va_pi"),
    "tuned": DemoRow(MODELS["tuned"].label, MODELS["tuned"].note, "tuned"),
    "base_guided": DemoRow(
        f"Base, guidance {GUIDANCE['base']}",
        "the best on validation digits",
        None,
        {"guidance_scale": GUIDANCE["base"]},
    ),
    "va_pi_guided": DemoRow(
        f"VA-π, guidance {GUIDANCE['va_pi']}",
        "the best on validation digits",
        "va_pi",
        {"guidance_scale": GUIDANCE["va_pi"]},
    ),
}


def demo(output: Path, *, steps: int = 80, samples: int = 1000, seeds: int = 2) -> Path:
    """Carry it out in `output`; returns the page. An earlier demo there is replaced, anything else refused."""
    if not 50 <= samples <= 100_000 or samples % 10:
        raise VarpiError(f"--samples is {samples}; it must be a multiple of 10, at least 50 and at most 100000")
    if not 2 <= seeds <= 1000:
        raise VarpiError(f"--seeds is {seeds}; an uncertainty needs at least 2, and there are at most 1000")
    if steps < 1:
        raise VarpiError(f"--steps is {steps}; it must be at least 1")
    begun = time.perf_counter()
    length = [f"training.steps={steps}", f"training.save_every={steps}", "validation=null"]
    changes = {name: [*length, *model.changes] for name, model in MODELS.items()}
    recipes = {name: load_recipe(model.recipe, changes[name]) for name, model in MODELS.items()}
    _clear(output)
    training = recipes["tuned"].training
    _say(f"{steps} steps of training, {len(MODELS)} times; {seeds} x {samples} images for each of {len(ROWS)} rows")
    with open_pool() as pool:
        bench = Bench(pool, samples, range(FIRST_SEED, FIRST_SEED + seeds))
        runs = {name: bench.train(name, MODELS[name].recipe, changes[name], output / name) for name in MODELS}
        measured = {name: bench.evaluate(name, "digits", row.sampling) for name, row in ROWS.items() if not row.model}
        for name, row in ROWS.items():
            if row.model:
                measured[name] = bench.evaluate(name, runs[row.model].result(), row.sampling)
        results = {name: summarize([one.result() for one in measured[name]]) for name in ROWS}

    tokenizer, test = load_tokenizer("digits"), open_dataset("digits", image_size=32, split="test")
    metrics = {
        **results,
        "settings": {
            "samples": samples,
            "sampling_seeds": list(bench.seeds),
            "reference": f"{len(test)} test digits",
            "sampling": {name: row.sampling for name, row in ROWS.items()},
            "steps": steps,
            "seconds": round(time.perf_counter() - begun, 1),
            **environment(),
        },
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    models = {"base": load_generator("digits")}
    models |= {name: load_generator(output / name / "model.safetensors") for name in reversed(MODELS)}
    classes = torch.arange(10).repeat(5)
    grids = {
        name: draw_samples(ROWS[name].label, model, tokenizer, classes, Sampling(seed=FIRST_SEED))
        for name, model in models.items()
    }
    before_after(output / PICTURE, grids["base"], grids["tuned"])
    page = Page(
        title="VA-π on the embedded digits",
        paragraph=_paragraph(samples, seeds, len(test), training),
        command=f"varpi demo --steps {steps} --samples {samples} --seeds {seeds}",
        verdict=_verdict(results),
        tables=[
            _group("Without guidance", results, guided=False),
            _group("With guidance, at twice the sampling cost", results, guided=True),
        ],
        samples=[*grids.values()],
        reconstructions=reconstructions(models["base"], models["tuned"], tokenizer, test, range(0, 800, 81)),
        curves={model.label: read_metrics(output / name) for name, model in MODELS.items()},
        environment=environment(),
        recipe=recipes["tuned"].to_yaml(),
        costs={model.label: costs(output / name) for name, model in MODELS.items()},
    )
    write_page(output / "report.html", page)
    _say(_table(results))
    return output / "report.html"


class Bench:
    """The demo's jobs in a pool of processes: training, and the evaluation of samples from fixed seeds."""

    def __init__(self, pool: Executor, samples: int, seeds: Sequence[int]) -> None:
        self.pool = pool
        self.samples = samples
        self.seeds = seeds

    def train(self, what: str, recipe: str, changes: list[str], run: Path) -> "Future[Path]":
        """The weights that come of a shipped recipe with these changes."""
        return self._submit(f"trained {what}", _train, recipe, changes, run)

    def evaluate(self, what: str, model: str | Path, sampling: dict[str, float]) -> "list[Future[dict[str, float]]]":
        """Measurements of a model against the test split, one a seed."""
        return [
            self._submit(f"measured {what}, seed {seed}", _measure, model, sampling, self.samples, seed)
            for seed in self.seeds
        ]

    def _submit(self, what: str, job: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Begin a job; `what` is said once it has succeeded."""

        def tell(done: "Future[Any]") -> None:
            if not done.cancelled() and done.exception() is None:
                _say(what)

        future = self.pool.submit(job, *arguments)
        future.add_done_callback(tell)
        return future


def _train(recipe: str, changes: list[str], run: Path) -> Path:
    train(load_recipe(recipe, changes), run, device="cpu", show=False)
    return run / "model.safetensors"


def _measure(model: str | Path, sampling: dict[str, Any], count: int, seed: int) -> dict[str, float]:
    """What the judge finds of `count` samples beside the test digits."""
    tokenizer, judge, reference = _instruments()
    classes = torch.arange(10).repeat(count // 10)
    tokens = generate(load_generator(model), classes, seed=seed, batch_size=200, **sampling)
    return measure(decode_in_parts(tokenizer, tokens), classes, judge, reference)


@cache
def _instruments() -> tuple[Tokenizer, SmallConvNet, torch.Tensor]:
    """The tokenizer, the judge, and the features of the test digits."""
    judge, dataset = load_judge(), open_dataset("digits", image_size=32, split="test")
    real = torch.stack([dataset[i].image for i in range(len(dataset))])
    return load_tokenizer("digits"), judge, embed(judge, real)[0]


def _clear(output: Path) -> None:
    """Make room for the demo in `output`, where an earlier one may lie."""
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / MARK).is_file())):
        raise VarpiError(f"{output} holds something that is not a demo; choose another --output")
    for name in MODELS:
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("metrics.json", "report.html", PICTURE):
        (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text("{}\n")


def _verdict(results: dict[str, dict[str, list[float]]]) -> str:
    """Whether the best setting leads the base and the control by more than twice what sampling seeds spread."""
    (base, a), (control, b), (tuned, c) = (results[name]["frechet_distance"] for name in ("base", "control", "tuned"))
    clear = min(base - 2 * math.hypot(a, c), control - 2 * math.hypot(b, c)) > tuned
    return (
        f"Fréchet distance without guidance, lower is better: {base:.3f} ± {a:.3f} as pretrained, {control:.3f} ± "
        f"{b:.3f} after cross-entropy alone, {tuned:.3f} ± {c:.3f} after {MODELS['tuned'].label}: "
        + ("a clear gain, as far as one training seed can show." if clear else "no gain that this run can show.")
    )


def _group(title: str, results: dict[str, dict[str, list[float]]], *, guided: bool) -> ResultTable:
    rows = [
        TableRow(row.label, results[name], row.note, of_interest=name == "tuned")
        for name, row in ROWS.items()
        if ("guidance_scale" in row.sampling) == guided
    ]
    return table(rows, title)


def _paragraph(samples: int, seeds: int, reference: int, training: Any) -> str:
    return (
        "A class-conditional LlamaGen of 2.7 million parameters, pretrained on 3800 handwritten digits until its "
        f"held-out likelihood stopped improving, was post-trained for {training.steps} steps of {training.batch_size} "
        "of the same images in the same order: by VA-π, whose reward compares decoded samples with the image in "
        "pixels and features; by its best setting here, which follows the reward's gradient and learns guidance; and "
        f"by cross-entropy alone. Each row is measured on {samples} free-running samples per seed, {seeds} sampling "
        f"seeds, against {reference} test digits that no model saw, in the features of a judge that had no part in "
        "training. One training seed; varpi study digits has three, and chose temperature and guidance on validation "
        "digits."
    )


def _table(results: dict[str, dict[str, list[float]]]) -> str:
    lines = [f"{'':28}{'Fréchet distance':>20}{'precision':>12}{'recall':>10}{'agreement':>12}"]
    for name, row in ROWS.items():
        mean, deviation = results[name]["frechet_distance"]
        rest = "".join(
            f"{results[name][key][0]:>{width}.3f}"
            for key, width in (("precision", 12), ("recall", 10), ("class_agreement", 12))
        )
        lines.append(f"{row.label:28}{f'{mean:.3f} ± {deviation:.3f}':>20}{rest}")
    return "\n".join(lines)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
