"""The main job from end to end on the embedded digits: evaluate, post-train, evaluate again, write it all down.

Beside VA-π stand the control (cross-entropy alone: same images, order, steps and learning rate) and what costs no
training: the base at its best temperature and with guidance, both chosen on the validation split. Everything is
reported on the test split, which no model saw, by a judge that took no part in training.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from varpi.data import Dataset, open_dataset
from varpi.errors import VarpiError
from varpi.evaluation import measure, summarize
from varpi.networks.digits import embed, load_judge
from varpi.recipe import load_recipe
from varpi.report import Page, TableRow, write_page
from varpi.report.examples import decode_in_parts, draw_samples, reconstructions
from varpi.report.provenance import costs, environment
from varpi.sampling.generate import generate
from varpi.training import read_metrics, train
from varpi.weights import load_generator, load_tokenizer

TEMPERATURES = (0.8, 0.9)
GUIDANCE_SCALES = (1.5, 2.0)
FIRST_SEED = 1000
MARKER = "demo.json"


def demo(output: Path, *, steps: int | None = None, samples: int = 1000, seeds: int = 3) -> Path:
    """Carry it out in `output`; returns the page. An earlier demo there is replaced, anything else refused."""
    if not 50 <= samples <= 100_000 or samples % 10:
        raise VarpiError(f"--samples is {samples}; it must be a multiple of 10, at least 50 and at most 100000")
    if not 2 <= seeds <= 1000:
        raise VarpiError(f"--seeds is {seeds}; an uncertainty needs at least 2, and there are at most 1000")
    if steps is not None and steps < 1:
        raise VarpiError(f"--steps is {steps}; it must be at least 1")
    _clear(output)
    begun = time.perf_counter()
    bench = Bench(samples, seeds)
    base = load_generator("digits")

    _say(f"evaluating the base: {seeds} x {samples} images")
    results = {"base": bench.evaluate(base)}
    temperature = min(TEMPERATURES, key=lambda value: bench.validate(base, temperature=value))
    results["base_best_temperature"] = bench.evaluate(base, temperature=temperature)
    scale = min(GUIDANCE_SCALES, key=lambda value: bench.validate(base, guidance_scale=value))
    results["base_guided"] = bench.evaluate(base, guidance_scale=scale)

    models, recipes = {"base": base}, {}
    for name, recipe_name, label in (
        ("control", "digits-next-token", "cross-entropy alone"),
        ("tuned", "digits", "VA-π"),
    ):
        settings = [] if steps is None else [f"training.steps={steps}", f"training.save_every={steps}"]
        recipes[name] = load_recipe(recipe_name, settings)
        _say(f"post-training with {label}: {recipes[name].training.steps} steps")
        run = train(recipes[name], output / name, device="cpu")
        models[name] = load_generator(run / "model.safetensors")
        results[name] = bench.evaluate(models[name])

    training = recipes["tuned"].training
    labels = {
        "base": ("Base", "as pretrained, temperature 1, no guidance"),
        "base_best_temperature": (f"Base, temperature {temperature}", "the best of the validation split"),
        "base_guided": (f"Base, guidance {scale}", "the best of the validation split; twice the sampling cost"),
        "control": ("Cross-entropy alone", f"{training.steps} steps of {training.batch_size} images; the control"),
        "tuned": ("VA-π", "the same steps and images with the pixel reward"),
    }
    metrics = {
        **results,
        "settings": {
            "samples": samples,
            "sampling_seeds": list(bench.seeds),
            "reference": f"{len(bench.test)} test digits",
            "temperature": temperature,
            "guidance_scale": scale,
            "steps": training.steps,
            "seconds": round(time.perf_counter() - begun, 1),
            **environment(),
        },
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    classes = torch.arange(10).repeat(5)
    page = Page(
        title="VA-π on the embedded digits",
        paragraph=_paragraph(samples, seeds, len(bench.test), training),
        command=_command(steps, samples, seeds),
        table=[TableRow(labels[name][0], results[name], labels[name][1]) for name in labels],
        samples=[
            draw_samples(labels[name][0], model, bench.tokenizer, classes, FIRST_SEED) for name, model in models.items()
        ],
        reconstructions=reconstructions(base, models["tuned"], bench.tokenizer, bench.test, range(0, 800, 81)),
        curves={"VA-π": read_metrics(output / "tuned"), "Cross-entropy alone": read_metrics(output / "control")},
        environment=environment(),
        recipe=recipes["tuned"].to_yaml(),
        costs={"VA-π": costs(output / "tuned"), "Cross-entropy alone": costs(output / "control")},
    )
    write_page(output / "report.html", page)
    _say(_table(labels, results))
    return output / "report.html"


class Bench:
    """The demo's evaluation: samples of fixed seeds, judged against held-out digits."""

    def __init__(self, samples: int, seeds: int) -> None:
        self.tokenizer = load_tokenizer("digits")
        self.judge = load_judge()
        self.classes = torch.arange(10).repeat(samples // 10)
        self._fewer = self.classes[:400]
        self.seeds = range(FIRST_SEED, FIRST_SEED + seeds)
        self.test = open_dataset("digits", image_size=32, split="test")
        self._test = self._features(self.test)
        self._validation = self._features(open_dataset("digits", image_size=32, split="validation"))

    def evaluate(self, generator: Any, **sampling: float) -> dict[str, list[float]]:
        """{metric: [mean, std over sampling seeds]} against the test split."""
        return summarize([self._measure(generator, self.classes, seed, self._test, sampling) for seed in self.seeds])

    def validate(self, generator: Any, **sampling: float) -> float:
        """Fréchet distance against the validation split, of 400 samples at most, from a seed that no figure uses."""
        seed = FIRST_SEED - 1
        return self._measure(generator, self._fewer, seed, self._validation, sampling)["frechet_distance"]

    def _measure(
        self, generator: Any, classes: torch.Tensor, seed: int, reference: Any, sampling: dict[str, Any]
    ) -> dict[str, float]:
        tokens = generate(generator, classes, seed=seed, batch_size=200, **sampling)
        return measure(decode_in_parts(self.tokenizer, tokens), classes, self.judge, reference)

    def _features(self, dataset: Dataset) -> Any:
        return embed(self.judge, torch.stack([dataset[i].image for i in range(len(dataset))]))[0]


def _clear(output: Path) -> None:
    """Make room for the demo in `output`, where an earlier one may lie."""
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / MARKER).is_file())):
        raise VarpiError(f"{output} holds something that is not a demo; choose another --output")
    for name in ("control", "tuned"):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in ("metrics.json", "report.html"):
        (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("{}\n")


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
