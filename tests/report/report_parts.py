"""Parts of pages for the tests of the report: made-up images, curves and results."""

import hashlib
from typing import Any

import numpy as np

from varpi.evaluation.result import Result
from varpi.report import (
    ClassChanges,
    Embeddings,
    NamedResult,
    Page,
    Reconstruction,
    SampleGrid,
    ScoredImages,
    TableRow,
)

EVIL = '"><script>alert(1)</script>'


def pictures(n: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def curve(*metrics: str, steps: int = 60) -> list[dict[str, float]]:
    return [{"step": step, **{name: 1 / step for name in metrics}} for step in range(1, steps + 1)]


def vectors(n: int, shift: float = 0.0, width: int = 8) -> np.ndarray:
    values = np.random.default_rng(n).normal(size=(n, width)) * np.linspace(2, 0.5, width)
    return values + shift * (np.arange(width) == 0)


def result(
    metrics: dict[str, float], *, kind: str = "distribution", seed: int = 0, model: str = "base.pt", **changes: Any
) -> Result:
    """A result with a full record. changes: fields of Result, or settings of the sampling."""
    sampling = {
        "generator": model,
        "generator_sha256": ("a" if model == "base.pt" else "b") * 64,
        "tokenizer": "vq.pt",
        "guidance_scale": 1.0,
        "temperature": 1.0,
        "top_k": 0,
        "resize": None,
        "seed": seed,
        "classes": {"count": 5000, "different": 10},
    }
    fields = {name: changes.pop(name) for name in list(changes) if name in Result.__dataclass_fields__}
    sha256 = hashlib.sha256(f"{model} {seed}".encode())
    whole: dict[str, Any] = {
        "samples": {"source": f"out/{model}/{seed}", "sha256": sha256.hexdigest(), "count": 5000},
        "sampling": {**sampling, **changes},
        "reference": {"source": "adm.npz", "sha256": "c" * 64, "count": 10_000},
        "evaluator": {"extractor": {"name": "inception", "sha256": "d" * 64}, "neighbors": 3, "device": "cpu"},
    }
    return Result(kind=kind, metrics=metrics, **{**whole, **fields})


def full_report() -> Page:
    """A page with every part on it, large images included."""
    seeds = [result({"fid": 14.0 + seed, "precision": 0.6}, seed=seed) for seed in (0, 1)]
    tuned = result({"fid": 9.5, "precision": 0.7}, model="tuned.pt", guidance_scale=1.75, warnings=["5,000 samples"])
    geneval = {"overall": 0.3, "single_object": 0.9, "two_object": 0.4, "counting": 0.2, "colors": 0.6, "position": 0.1}
    many = [result({**geneval, "color_attr": 0.05}, kind="geneval", model=model) for model in ("base.pt", "tuned.pt")]
    classes = {f"class {i}": (0.5, 0.5 + (i - 12) / 50) for i in range(30)}
    prompts = ["a red bicycle", "two cats"]
    return Page(
        title="Everything",
        paragraph="All parts.",
        command="varpi report runs/xxl",
        table=[TableRow("Base", {"recall": [0.5, 0.01]}), TableRow("Tuned", {"recall": 0.6})],
        results=[NamedResult("Base", [*seeds, many[0]]), NamedResult("Tuned", [tuned, many[1]], "VA-π")],
        samples=[SampleGrid(name, pictures(4, 96), prompts * 2) for name in ("Base", "Tuned")],
        reconstructions=[Reconstruction(*pictures(4))] * 3,
        extremes=[ScoredImages("Tuned", pictures(9, 96), np.arange(9.0), "HPS v2.1", ["a prompt"] * 9, most=3)],
        per_class=[ClassChanges("class_agreement", classes)],
        embeddings=Embeddings({"real": vectors(30), "base": vectors(24, 2.0), "tuned": vectors(24)}, "toy features"),
        curves={"VA-π": curve("reward_mean", "cross_entropy"), "Control": curve("cross_entropy")},
        environment={"torch": "2.15"},
        recipe="method: va_pi\n",
        costs={"VA-π": {"minutes": 1.5, "images": 12_800, "FLOPs": 1.377e17}, "Control": {"minutes": 1.0}},
    )
