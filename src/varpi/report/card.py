"""A run as a directory for others: its weights in every form that loads, its recipe, and a model card.

    FOLDER/    README.md, recipe.yaml, model.safetensors, and llamagen.pt where the original code reads such a file

The card begins with the metadata that the Hugging Face Hub reads: licence, base model, results.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import varpi
from varpi.errors import VarpiError
from varpi.evaluation import Result, read_result
from varpi.generators import Generator
from varpi.generators.llamagen_files import SIZES
from varpi.recipe import Recipe
from varpi.report.columns import COLUMNS
from varpi.report.pictures import PICTURE
from varpi.report.provenance import costs
from varpi.runtime import hub
from varpi.runtime.sources import EMBEDDED, ENDINGS
from varpi.runtime.tensors import sha256_of
from varpi.tokenizers import Tokenizer
from varpi.training import read_metrics
from varpi.weights import export_original, load_generator, load_tokenizer
from varpi.weights.pair import RUN_MODEL, recipe_of

ORIGINAL = "llamagen.pt"
PAPER = "2512.19680"


def export_with_card(
    run: Path,
    folder: Path,
    *,
    name: str,
    base_model: str | None = None,
    licence: str | None = None,
    licence_link: str | None = None,
    results: Sequence[Path] = (),
) -> None:
    """Fill `folder`, which is made, with a finished run's weights, its recipe and its card.

    name: what the card calls the model, and how its examples load it: a Hub id, or the folder.
    base_model: Hub id of what the run began with; by default the recipe's source, where it is one.
    licence: as the Hub spells it. results: of `varpi evaluate`, beside those that lie in the run.

    Raises VarpiError when the run is not one that can be given away, or what it began with is not known well enough.
    """
    recipe = recipe_of(run)
    weights = run / RUN_MODEL
    if recipe is None or not weights.is_file():
        raise VarpiError(f"{run}: is no finished run (recipe.yaml, {RUN_MODEL}); a card tells what a run did")
    base_model = base_model or _hub_id(_trained_source(recipe))
    licence = licence or ("apache-2.0" if _trained_source(recipe) in EMBEDDED else None)
    _check_licence(licence, licence_link)
    digest = sha256_of(weights)
    found = [*(read_result(path) for path in results), *_results_in(run, digest, {path.resolve() for path in results})]
    for path, result in zip(results, found, strict=False):
        if _measured(result) not in (None, digest):
            raise VarpiError(f"--results {path}: was measured on other weights than {weights}")
    trains_tokenizer = recipe.generator is None or recipe.method.trains == "tokenizer"
    model = load_tokenizer(weights) if trains_tokenizer else load_generator(weights)
    data = ModelCardData(
        model_name=name.rpartition("/")[2],
        license=licence,
        license_name="licence-of-the-base-model" if licence == "other" else None,
        license_link=licence_link,
        base_model=base_model,
        library_name="varpi" if model.hf_config is None else "transformers",
        pipeline_tag="text-to-image" if isinstance(model, Generator) and model.num_classes is None else None,
        tags=["varpi", recipe.method.name.replace("_", "-"), "autoregressive-image-generation", f"arxiv:{PAPER}"],
        eval_results=[entry for result in found for entry in _entries(result)] or None,
    )
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_weights(model, weights, aside)
        (aside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        if (run / PICTURE).is_file():
            shutil.copyfile(run / PICTURE, aside / PICTURE)
        files = {path.name: sha256_of(path) for path in sorted(aside.iterdir()) if path.suffix in ENDINGS}
        text = "\n".join(_body(run, recipe, model, name, base_model, licence, files, found))
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(aside / "README.md")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_weights(model: Generator | Tokenizer, weights: Path, folder: Path) -> None:
    if model.hf_config is not None:
        export_original(model, folder)
        return
    try:
        os.link(weights, folder / RUN_MODEL)  # no second copy, where the file system allows
    except OSError:
        shutil.copyfile(weights, folder / RUN_MODEL)
    export_original(model, folder / ORIGINAL)


def _trained_source(recipe: Recipe) -> str | None:
    """Where the weights that were trained came from; None: nowhere."""
    section = recipe.tokenizer if recipe.method.trains == "tokenizer" else recipe.generator or recipe.tokenizer
    if section is None:
        raise VarpiError(f"method {recipe.method.name} trains neither a generator nor a tokenizer: there is no card")
    return section.source


def _hub_id(source: str | None) -> str | None:
    """The repository of a Hub id; None for what lies here or is embedded."""
    match = hub.ID.fullmatch(source or "")
    if match is None or os.path.exists(match[0]) or Path(match["repo"]).suffix in ENDINGS:
        return None
    return match["repo"]


def _check_licence(licence: str | None, link: str | None) -> None:
    if licence is None:
        raise VarpiError(
            "--license is missing: say it as the Hub spells it, for instance mit; that of the weights that the run "
            "began with binds its result too"
        )
    if (licence == "other") != (link is not None):
        raise VarpiError("--license other needs --license-link, and no other licence has one")


def _results_in(run: Path, digest: str, known: set[Path]) -> list[Result]:
    """The results of these very weights that lie in the run's directory."""
    found = []
    for path in sorted({*run.glob("*.json"), *run.glob("*/*.json")}):
        if path.resolve() not in known:
            try:
                result = read_result(path)
            except VarpiError:
                continue
            if _measured(result) == digest:
                found.append(result)
    return found


def _measured(result: Result) -> str | None:
    """Of which weights a result is; None where that is not known."""
    return (result.sampling or {}).get("generator_sha256")


def _entries(result: Result) -> list[EvalResult]:
    source = str((result.reference or {}).get("source") or result.samples.get("source") or "prompts")
    task = "text-to-image" if result.kind in ("text", "geneval") else "image-generation"
    return [
        EvalResult(
            task_type=task,
            dataset_type=source,
            dataset_name=source,
            metric_type=metric,
            metric_name=COLUMNS[metric].label if metric in COLUMNS else metric,
            metric_value=value,
        )
        for metric, value in result.metrics.items()
    ]


def _body(
    run: Path,
    recipe: Recipe,
    model: Generator | Tokenizer,
    name: str,
    base_model: str | None,
    licence: str | None,
    files: dict[str, str],
    results: Sequence[Result],
) -> list[str]:
    source = _trained_source(recipe)
    began = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{source or 'fresh weights'}`"
    kind = "generator" if isinstance(model, Generator) else "tokenizer"
    spent = costs(run)
    lines = [
        f"# {name.rpartition('/')[2]}",
        "",
        f"An autoregressive image {kind}: {began}, {'trained further' if source else 'trained'} with "
        f"varpi {varpi.__version__} by the method `{recipe.method.name}`: "
        f"{read_metrics(run)[-1]['step']} updates of {recipe.training.batch_size} images of {recipe.data.image_size} "
        f"pixels from `{recipe.data.source}`, {spent['minutes']} minutes. Every setting is in `recipe.yaml`.",
        "",
        *(
            [f"![Samples before and after, of the same classes or captions and random numbers]({PICTURE})", ""]
            if (run / PICTURE).is_file()
            else []
        ),
        "## How to use it",
        "",
        *_usage(recipe, model, name),
        "",
        "## Results",
        "",
        *(_tables(results) or ["None were measured: `varpi evaluate` makes them."]),
        "",
        "## What it is made of",
        "",
        "| | |",
        "|---|---|",
        *(f"| `{file}`, sha256 | `{digest}` |" for file, digest in files.items()),
        f"| began with | {began} |",
        f"| licence | {licence} |",
        "",
        f"VA-π, after which varpi is named, is [arXiv {PAPER}](https://arxiv.org/abs/{PAPER}).",
        "",
    ]
    return lines


def _usage(recipe: Recipe, model: Generator | Tokenizer, name: str) -> list[str]:
    if not isinstance(model, Generator):
        return [
            "```python",
            "import varpi",
            "",
            f'tokenizer = varpi.load_tokenizer("{name}")  # .encode(images), .decode(tokens)',
            "```",
            *(
                [f"\n`{ORIGINAL}` is the same for LlamaGen's own code (`--vq-ckpt`)."]
                if model.hf_config is None
                else []
            ),
        ]
    tokenizer = recipe.tokenizer.source if recipe.tokenizer is not None else None
    own = model.hf_config is not None
    words = [f"varpi sample {name} --output samples"]
    words += [] if own else [f"--tokenizer {tokenizer}"]
    if recipe.generator is not None and recipe.generator.text_encoder is not None:
        words.append(f"--text-encoder {recipe.generator.text_encoder}")
    words.append("--per-class 1" if model.num_classes is not None else '--prompt "a red bicycle on a beach"')
    lines = ["```sh", " ".join(words), "```"]
    if model.hf_config is not None:
        kind = (model.hf_config.get("architectures") or ["AutoModel"])[0]
        return [*lines, "", "```python", f"from transformers import {kind}", "",
                f'model = {kind}.from_pretrained("{name}")', "```"]  # fmt: skip
    config: Any = model.config
    sizes = {(layers, dim): size.upper() for size, (layers, dim, _) in SIZES.items()}
    size = sizes.get((config.n_layer, config.dim))
    lines += ["", f"`{ORIGINAL}` is the same for LlamaGen's own code"]
    if size is None:
        return [*lines[:-1], lines[-1] + f", for a model of {config.n_layer} layers of width {config.dim}."]
    script = "c2i" if model.num_classes is not None else "t2i"
    return [
        *lines[:-1],
        lines[-1] + ":",
        "",
        "```sh",
        f"python3 autoregressive/sample/sample_{script}.py --gpt-ckpt {ORIGINAL} --from-fsdp --gpt-model GPT-{size} "
        f"--image-size {recipe.data.image_size} --vq-ckpt {tokenizer}",
        "```",
    ]


def _tables(results: Sequence[Result]) -> list[str]:
    lines = []
    for result in results:
        sampling, reference = result.sampling or {}, result.reference or {}
        told = {
            "samples": result.samples.get("count"),
            "guidance": sampling.get("guidance_scale"),
            "temperature": sampling.get("temperature"),
            "seed": sampling.get("seed"),
            "against": reference.get("source"),
            "by": result.evaluator.get("extractor", result.evaluator).get("name"),
        }
        lines += ["" if lines else None, "| metric | value |", "|---|---|"]
        for metric, value in result.metrics.items():
            lines.append(f"| {COLUMNS[metric].label if metric in COLUMNS else metric} | {value:.4g} |")
        settings = "; ".join(f"{key} {value}" for key, value in told.items() if value is not None)
        lines += ["", f"{result.kind}: {settings}."]
        lines += [f"Note: {warning}." for warning in result.warnings]
    return [line for line in lines if line is not None]
