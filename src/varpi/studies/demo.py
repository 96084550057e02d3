"""The main job from end to end on the embedded digits: evaluate, post-train, evaluate again, write it all down.

Beside VA-π stand the control (cross-entropy alone: same images, order, steps and learning rate) and what costs no
training: the base at its best temperature and with guidance, both chosen on the validation split. Everything is
reported on the test split, which no model saw, by a judge that took no part in training.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
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
from varpi.report.provenance import costs, environment
from varpi.sampling.generate import generate
from varpi.studies.jobs import open_pool
from varpi.tokenizers import Tokenizer
from varpi.training import read_metrics, train
from varpi.weights import load_generator, load_tokenizer

RECIPES = {"control": "digits-next-token", "tuned": "digits"}
TEMPERATURES = (0.8, 0.9)
GUIDANCE_SCALES = (1.5, 2.0)
FIRST_SEED = 1000
MARK = "demo.json"
"""What lies in a folder that a demo made."""


def demo(output: Path, *, steps: int | None = None, samples: int = 1000, seeds: int = 3) -> Path:
    """Carry it out in `output`; returns the page. An earlier demo there is replaced, anything else refused."""
    if not 50 <= samples <= 100_000 or samples % 10:
        raise VarpiError(f"--samples is {samples}; it must be a multiple of 10, at least 50 and at most 100000")
    if not 2 <= seeds <= 1000:
        raise VarpiError(f"--seeds is {seeds}; an uncertainty needs at least 2, and there are at most 1000")
    if steps is not None and steps < 1:
        raise VarpiError(f"--steps is {steps}; it must be at least 1")
    begun = time.perf_counter()
    changes = [] if steps is None else [f"training.steps={steps}", f"training.save_every={steps}"]
    recipes = {name: load_recipe(recipe, changes) for name, recipe in RECIPES.items()}
    _clear(output)
    training = recipes["tuned"].training
    _say(f"{training.steps} steps of training, twice; {seeds} x {samples} images of each of five models")
    with open_pool() as pool:
        bench = Bench(pool, samples, range(FIRST_SEED, FIRST_SEED + seeds))
        runs = {name: bench.train(name, recipe, changes, output / name) for name, recipe in RECIPES.items()}
        measured = {"base": bench.evaluate("base")}
        temperature = bench.best("temperature", TEMPERATURES)
        measured["base_best_temperature"] = bench.evaluate("base", temperature=temperature)
        scale = bench.best("guidance_scale", GUIDANCE_SCALES)
        measured["base_guided"] = bench.evaluate("base", guidance_scale=scale)
        for name, run in runs.items():
            measured[name] = bench.evaluate(name, run.result())
        results = {name: summarize([one.result() for one in several]) for name, several in measured.items()}

    labels = {
        "base": ("Base", "as pretrained, temperature 1, no guidance"),
        "base_best_temperature": (f"Base, temperature {temperature}", "the best of the validation split"),
        "base_guided": (f"Base, guidance {scale}", "the best of the validation split; twice the sampling cost"),
        "control": ("Cross-entropy alone", f"{training.steps} steps of {training.batch_size} images; the control"),
        "tuned": ("VA-π", "the same steps and images with the pixel reward"),
    }
    tokenizer, test = load_tokenizer("digits"), open_dataset("digits", image_size=32, split="test")
    metrics = {
        **results,
        "settings": {
            "samples": samples,
            "sampling_seeds": list(bench.seeds),
            "reference": f"{len(test)} test digits",
            "temperature": temperature,
            "guidance_scale": scale,
            "steps": training.steps,
            "seconds": round(time.perf_counter() - begun, 1),
            **environment(),
        },
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    models = {"base": load_generator("digits")}
    models |= {name: load_generator(output / name / "model.safetensors") for name in RECIPES}
    classes = torch.arange(10).repeat(5)
    page = Page(
        title="VA-π on the embedded digits",
        paragraph=_paragraph(samples, seeds, len(test), training),
        command=_command(steps, samples, seeds),
        table=[TableRow(labels[name][0], results[name], labels[name][1]) for name in labels],
        samples=[
            draw_samples(labels[name][0], model, tokenizer, classes, FIRST_SEED) for name, model in models.items()
        ],
        reconstructions=reconstructions(models["base"], models["tuned"], tokenizer, test, range(0, 800, 81)),
        curves={"VA-π": read_metrics(output / "tuned"), "Cross-entropy alone": read_metrics(output / "control")},
        environment=environment(),
        recipe=recipes["tuned"].to_yaml(),
        costs={"VA-π": costs(output / "tuned"), "Cross-entropy alone": costs(output / "control")},
    )
    write_page(output / "report.html", page)
    _say(_table(labels, results))
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

    def evaluate(self, what: str, model: str | Path = "digits", **sampling: float) -> "list[Future[dict[str, float]]]":
        """Measurements of a model against the test split, one a seed."""
        said = "".join(f", {name.replace('_', ' ')} {value}" for name, value in sampling.items())
        return [
            self._submit(f"measured {what}{said}, seed {seed}", _measure, model, sampling, self.samples, seed, "test")
            for seed in self.seeds
        ]

    def best(self, setting: str, values: Sequence[float]) -> float:
        """The value at which the base's Fréchet distance to the validation split is least.

        Of 400 samples at most, from a seed that no figure uses.
        """
        count, seed = min(400, self.samples), FIRST_SEED - 1
        jobs = {}
        for value in values:
            what = f"tried {setting.replace('_', ' ')} {value}"
            jobs[value] = self._submit(what, _measure, "digits", {setting: value}, count, seed, "validation")
        return min(values, key=lambda value: jobs[value].result()["frechet_distance"])

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


def _measure(model: str | Path, sampling: dict[str, Any], count: int, seed: int, split: str) -> dict[str, float]:
    """What the judge finds of `count` samples beside the digits of a split."""
    tokenizer, judge, reference = _instruments(split)
    classes = torch.arange(10).repeat(count // 10)
    tokens = generate(load_generator(model), classes, seed=seed, batch_size=200, **sampling)
    return measure(decode_in_parts(tokenizer, tokens), classes, judge, reference)


@cache
def _instruments(split: str) -> tuple[Tokenizer, SmallConvNet, torch.Tensor]:
    """The tokenizer, the judge, and the features of a split's digits."""
    judge, dataset = load_judge(), open_dataset("digits", image_size=32, split=split)
    real = torch.stack([dataset[i].image for i in range(len(dataset))])
    return load_tokenizer("digits"), judge, embed(judge, real)[0]


def _clear(output: Path) -> None:
    """Make room for the demo in `output`, where an earlier one may lie."""
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / MARK).is_file())):
        raise VarpiError(f"{output} holds something that is not a demo; choose another --output")
    for name in ("control", "tuned"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("metrics.json", "report.html"):
        (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text("{}\n")


def _paragraph(samples: int, seeds: int, reference: int, training: Any) -> str:
    return (
        "A class-conditional LlamaGen of 2.7 million parameters, pretrained on 3800 handwritten digits until its "
        f"held-out likelihood stopped improving, was post-trained for {training.steps} steps of {training.batch_size} "
        "of the same images: once by VA-π, whose reward compares decoded samples with the image in pixels and "
        "features, and once by cross-entropy alone, with the same images in the same order. Each row is measured on "
        f"{samples} free-running samples per seed, {seeds} sampling seeds, against {reference} test digits that no "
        "model saw, in the features of a judge that had no part in training. docs/log.md has all the trials."
    )


def _command(steps: int | None, samples: int, seeds: int) -> str:
    chosen = f" --steps {steps}" if steps is not None else ""
    return f"varpi demo{chosen} --samples {samples} --seeds {seeds}"


def _table(labels: dict[str, tuple[str, str]], results: dict[str, dict[str, list[float]]]) -> str:
    lines = [f"{'':28}{'Fréchet distance':>20}{'precision':>12}{'recall':>10}{'agreement':>12}"]
    for name, (label, _) in labels.items():
        row = results[name]
        mean, deviation = row["frechet_distance"]
        rest = "".join(
            f"{row[key][0]:>{width}.3f}" for key, width in (("precision", 12), ("recall", 10), ("class_agreement", 12))
        )
        lines.append(f"{label:28}{f'{mean:.2f} ± {deviation:.2f}':>20}{rest}")
    return "\n".join(lines)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
