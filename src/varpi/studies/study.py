"""Carrying out a study: variants of training and sampling x seeds, under one protocol, on one page.

It reads from top to bottom as what is done: train each variant with each seed, choose on the validation split what is
to be chosen, measure everything alike on the test split. What is not there yet is asked for as a job (`work.py`), and
the whole is looked at again when one is done; so any number of processes may do the jobs, in any order.
"""

import hashlib
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from varpi.errors import VarpiError
from varpi.networks.loading import EXTRACTORS, load_extractor
from varpi.recipe import Recipe
from varpi.recipes import shipped_recipes
from varpi.report.comparison import SHOWN
from varpi.runtime.files import write_text
from varpi.runtime.sources import EMBEDDED, ENDINGS, embedded, find
from varpi.runtime.tensors import sha256_of
from varpi.sampling.settings import Sampling
from varpi.studies.findings import Findings, StudyRow, write_findings
from varpi.studies.plan import (
    BEST,
    LOWER_IS_BETTER,
    OWN,
    SHAPES_DETECTOR,
    START,
    Judge,
    RowSampling,
    Study,
    Variant,
    flatten,
)
from varpi.studies.summary import UNTRAINED
from varpi.studies.tasks import (
    TOKENS,
    Subject,
    Weights,
    check_measures,
    count_operations,
    draw_tokens,
    identify_judge,
    look_at_pair,
    measure_tokens,
    see_reference,
    see_scenes,
    train_variant,
)
from varpi.studies.work import RECORDS, Job, Pending, Work, all_of
from varpi.training.run_directory import FREE_TO_CHANGE, is_finished, is_run
from varpi.training.state import checkpoints
from varpi.weights.pair import RUN_MODEL, recipe_of

_YOUNGER = {"training.ema": None, "method.score": "distance", "method.teacher_temperature": 1.0}
"""Settings that came after studies which go on, and what those did in their place."""
_MARK = "study.yaml"
"""What lies in a folder of a study."""


class Diverged(Exception):
    """Training came to no end; in what words, as the message."""


def carry_out_study(
    study: Study,
    where: str,
    output: Path,
    *,
    seeds: Sequence[int] | None = None,
    records: Sequence[Path] = (),
    jobs: int,
    device: str,
    command: str,
) -> Path:
    """Do, or go on with, a study in the directory `output`; returns its page, study.html, beside study.json.

    where: what errors call the study. seeds: some of its training seeds; None: all. jobs: so many at once.
    records: files of another machine's results to go on from, see `work.py`.
    command: what the page says it was made by.

    Raises:
        VarpiError: whatever can be refused, before any job begins; or jobs that failed, when all others are done.
        Stopped: SIGTERM or SIGINT came; the same call goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise VarpiError("a study shares its jobs by files, without torchrun: start it several times on one --output")
    for seed in seeds or ():
        if seed not in study.seeds:
            raise VarpiError(
                f"--seeds {seed}: is none of the study's training seeds, {', '.join(map(str, study.seeds))}"
            )
    if seeds is not None and len({*seeds}) < len(seeds):
        raise VarpiError(f"--seeds {' '.join(map(str, seeds))}: names a seed twice")
    recipes = study.recipes(where)
    start = _start(study)
    judges = {judge.key: identify_judge(judge) for judge in study.protocol.judges}
    rewards = {name: reward_networks(several, f"{where}: variants.{name}") for name, several in recipes.items()}
    for name, networks in rewards.items():
        for judge, identity in judges.items():
            for network, sha256 in networks.items():
                if sha256 == identity.get("weights_sha256"):
                    raise VarpiError(
                        f"{where}: variants.{name} is rewarded by the network that judges, {judge} ({network}): what "
                        "rewards must not measure; take another judge, or another reward"
                    )
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / _MARK).is_file())):
        raise VarpiError(f"{output} holds something that is not a study; choose another --output")
    work = Work(output, jobs, records)
    write_text(output / _MARK, f"# Of the latest `{command}`\n{study.to_yaml()}")
    bench = _Bench(study, recipes, start, judges, rewards, list(seeds or study.seeds), work, output, device)
    return write_findings(output, work.until(bench.look), command)


def reward_networks(recipes: Sequence[Recipe], where: str) -> dict[str, str]:
    """The networks that a method is rewarded by, {what it is called: sha256 of its weights}.

    Raises VarpiError for a file of weights that is not there, or is of a run that was not trained to its end.
    """
    found = {}
    for recipe in recipes:
        for key, value in flatten(recipe.method.model_dump(mode="json")).items():
            what = f"{key}: {value}"
            if not isinstance(value, str) or what in found:
                continue
            path = Path(value).expanduser()
            if value == "digits":  # what recipes call so is never the judge
                found[what] = sha256_of(embedded("digits", "perceptual"))
            elif value in EXTRACTORS and not key.endswith("name"):
                found[what] = load_extractor(value).identity["weights_sha256"]
            elif path.is_file():
                _check_finished(path, where)
                found[what] = sha256_of(path)
            elif path.is_dir():
                weights = (file for file in sorted(path.iterdir()) if file.suffix in ENDINGS)
                found |= {f"{key}: {file}": sha256_of(file) for file in weights}
            elif path.suffix in ENDINGS and ":" not in value:
                made = path.parent.name
                hint = f"; run `varpi train {made}` first" if made in shipped_recipes() else ""
                raise VarpiError(f"{where}: method.{key}: {value} is not there{hint}")
    return found


def _check_finished(source: Path, where: str) -> None:
    """Refuse a run, or its model, that was not trained to its end. One whose checkpoints are gone is trusted."""
    run = source.parent if source.name == RUN_MODEL else source
    if not is_run(run) or (recipe := recipe_of(run)) is None:
        return
    if not (run / RUN_MODEL).is_file() or (checkpoints(run) and not is_finished(run, recipe)):
        raise VarpiError(f"{where}: {run} has not been trained to its end; continue it with `varpi train --resume`")


def _start(study: Study) -> Weights:
    """The start pair. Raises VarpiError where it is not there, or is a run that was not trained to its end."""
    for part in (study.start.generator, study.start.tokenizer):
        if part not in EMBEDDED:
            _check_finished(Path(part), "start")
    hashes = [
        sha256_of(embedded(source, kind) if source in EMBEDDED else find(source))
        for kind, source in (("generator", study.start.generator), ("tokenizer", study.start.tokenizer))
    ]
    return Weights(START, study.start.generator, study.start.tokenizer, *hashes)


@dataclass
class _Bench:
    """The study as far as its jobs are done. Where one is not, it has been asked for and `Pending` is raised."""

    study: Study
    recipes: Mapping[str, Sequence[Recipe]]
    start: Weights
    judges: Mapping[str, Mapping[str, str]]
    rewards: Mapping[str, Mapping[str, str]]
    seeds: Sequence[int]
    work: Work
    output: Path
    device: str
    checked: bool = False

    def look(self) -> Findings:
        """All findings."""
        self.choices: dict[str, list[dict[str, Any]]] = {}
        self.makers: dict[Path, Job] = {}
        self.trained_on: dict[str, tuple[str, Any]] = {}
        self.pair = self.work(
            Job(
                "pair",
                look_at_pair,
                (self.start, self.study.data),
                {**self.start.hashes, "image_size": self.study.data.image_size},
            )
        )
        classes = self.pair["num_classes"]
        for where in (self.study.protocol, self.study.validation):
            if where is not None and classes is not None and where.samples % classes:
                raise VarpiError(f"{where.samples} samples of {classes} classes; it must be a multiple of {classes}")
        for judge in self.study.protocol.judges:
            if (judge.name == SHAPES_DETECTOR) != (classes is None):
                of = "captions" if classes is None else "classes"
                raise VarpiError(f"protocol.judges: {judge.name} is no judge of a generator of {of}")
        calls = []
        scales = self.study.validation.guidance_scales if self.study.validation is not None else []
        for name in (None, *self.study.variants):
            sampling = RowSampling() if name is None else self.study.variants[name].sampling
            calls.append(partial(self._row, name, sampling, guided=False))
            if scales and sampling.guidance_scale == 1 and (name is None or name in self.recipes):
                own = sampling.model_copy(update={"guidance_scale": BEST})
                calls.append(partial(self._row, name, own, guided=True))
        return Findings(
            study=self.study,
            seeds=self.seeds,
            pair={**self.start.hashes, **self.pair},
            judges=self.judges,
            rows=all_of(calls),
            references={
                judge.key: self._reference(judge, judge.split or self.study.protocol.split)
                for judge in self.study.protocol.judges
            },
            choices=self.choices,
            device=self.device,
        )

    def _check_measures(self) -> None:
        """Refuse, before hours of training, what no samples could be measured by."""
        if self.checked or self.pair["num_classes"] is None:
            return
        protocol, choice = self.study.protocol, self.study.validation
        sides = [(protocol.samples, judge.split or protocol.split, judge) for judge in protocol.judges]
        if choice is not None:
            sides.append((choice.samples, choice.split, protocol.judges[0]))
        for count, split, judge in sides:
            check_measures(self._asked(split), count, judge, protocol.metrics, self.device)
        self.checked = True

    def _row(self, name: str | None, sampling: RowSampling, *, guided: bool) -> StudyRow:
        """A variant, or with None the start pair, sampled in one way and measured on the test split."""
        variant = self.study.variants[name] if name is not None else Variant(label="Start", note="the pair as it is")
        trained = self._is_trained(name)
        row = StudyRow(name or START, guided, variant.label or name or START, variant.note, trained)
        try:
            row.sampling = self._sampling(name, sampling)
            if name is not None and variant.tune:
                row.changes = variant.tune[self._trial(name)]
            parts = all_of(
                partial(self._part, name, seed, row.sampling) for seed in (self.seeds if trained else [None])
            )
        except Diverged as error:
            row.diverged = str(error)
            return row
        row.passes = self.pair["num_tokens"] * (2 if row.sampling["guidance_scale"] > 1 else 1)
        row.cost = {key: statistics.fmean(part.cost[key] for part in parts) for key in parts[0].cost}
        needs = self._needs(parts[0].weights)
        self.work.have({path: job for path, job in needs.items() if path == Path(parts[0].weights.tokenizer)})
        row.drawn = parts[0].weights, parts[0].shown
        for part in parts:
            row.weights[part.seed] = part.weights.hashes
            for measured in part.measured:
                for judge, found in measured.items():
                    row.warnings.setdefault(judge, found["warnings"])
                    for metric, value in found["metrics"].items():
                        row.values.setdefault(judge, {}).setdefault(metric, {}).setdefault(part.seed, []).append(value)
        return row

    def _part(self, name: str | None, seed: int | None, settings: Mapping[str, Any]) -> "_Part":
        """What one training seed, or none, adds to a row."""
        weights, protocol = self._weights(name, seed), self.study.protocol
        both: list[Callable[[], Any]] = [
            lambda: all_of(partial(self._measured, weights, settings, one) for one in protocol.sampling_seeds),
            lambda: self._cost(name, seed),
        ]
        measured, cost = all_of(both)
        _, drawn = self._drawn(weights, settings, protocol.samples, protocol.sampling_seeds[0], protocol.split)
        return _Part(UNTRAINED if seed is None else str(seed), weights, drawn["shown"], measured, cost)

    # -- training

    def _is_trained(self, name: str | None) -> bool:
        """Whether there is a training behind a variant's weights."""
        return name is not None and (name in self.recipes or self._is_trained(self.study.variants[name].after))

    def _weights(self, name: str | None, seed: int | None) -> Weights:
        """What a variant samples from, of the trial that was chosen; None stands for the start."""
        if name is None:
            return self.start
        if name not in self.recipes:
            return self._weights(self.study.variants[name].after, seed)
        assert seed is not None
        return self._training(name, self._trial(name), seed)[0]

    def _training(self, name: str, trial: int, seed: int) -> tuple[Weights, dict[str, Any]]:
        """The weights of one training, and what it came to. Raises Diverged."""
        begin = self._weights(self.study.variants[name].after, seed)
        recipe = self._recipe(name, trial, seed, begin)
        place = f"{self._place(name, trial)}/seed-{seed}"
        rewards = {f"sha256 of {network}": sha256 for network, sha256 in self.rewards[name].items()}
        inputs = {**_kept(recipe), "seed": seed, **rewards, **begin.hashes, "device": self.device}
        arguments, needs = (recipe, self.device), self._needs(begin)
        job = Job(f"train/{place}", train_variant, arguments, inputs, spent="run/checkpoints", needs=needs)
        try:
            result = self.work(job)
        except Pending:
            self._check_measures()
            raise
        if "diverged" in result:
            raise Diverged(f"{name}, seed {seed}: {result['diverged']}")
        first, data = self.trained_on.setdefault(recipe.data.to_yaml(), (job.name, result.get("data")))
        if result.get("data") != data:
            raise VarpiError(
                f"{job.name} and {first} were trained on other data: what {recipe.data.source} holds has changed; "
                f"remove {self.output}/jobs and {self.output}/{RECORDS}, or choose another --output"
            )
        model, part = self.output / "jobs" / job.name / "run" / RUN_MODEL, result["part"]
        self.makers[model] = job
        return replace(begin, place=place, **{part: str(model), f"{part}_sha256": result["sha256"]}), result

    def _needs(self, weights: Weights) -> dict[Path, Job]:
        """The files of weights that jobs of this study make."""
        paths = Path(weights.generator), Path(weights.tokenizer)
        return {path: self.makers[path] for path in paths if path in self.makers}

    def _recipe(self, name: str, trial: int, seed: int, begin: Weights) -> Recipe:
        recipe = self.recipes[name][trial]
        sources = {
            part: section.model_copy(update={"source": getattr(begin, part)})
            for part in ("generator", "tokenizer")
            if (section := getattr(recipe, part)) is not None
        }
        return recipe.model_copy(update={**sources, "seed": seed})

    def _place(self, name: str, trial: int) -> str:
        """Of a variant's trial, as part of a path that a reader understands."""
        if not (tune := self.study.variants[name].tune):
            return name
        short = [_slug({key.rpartition(".")[2]: value for key, value in one.items()}) for one in tune]
        distinct = len({*short}) == len(short)
        return f"{name}/{short[trial] if distinct else _slug(tune[trial])}"

    def _cost(self, name: str | None, seed: int | None) -> dict[str, float]:
        """Of all training behind a variant's weights; that of trials which were not chosen is left out."""
        if name is None:
            return {}
        before = self._cost(self.study.variants[name].after, seed)
        if name not in self.recipes:
            return before
        assert seed is not None
        trial = self._trial(name)
        result = self._training(name, trial, seed)[1]
        recipe = self._recipe(name, trial, self.study.seeds[0], self.start)  # other weights are of the same sizes
        inputs = {**_kept(recipe), **self.start.hashes}
        counted = self.work(Job(f"count/{self._place(name, trial)}", count_operations, (recipe, self.device), inputs))
        own = {key: result[key] for key in ("steps", "images", "seconds")}
        own["operations"] = counted["operations"] * result["steps"]
        return {key: value + before.get(key, 0) for key, value in own.items()}

    # -- choosing, on the validation split, by the runs of the first training seed

    def _trial(self, name: str) -> int:
        """Which trial of a variant is best. Raises Diverged where none came to an end."""
        variant = self.study.variants[name]
        if not variant.tune:
            return 0
        plain = {key: 1.0 if value == BEST else value for key, value in variant.sampling.model_dump().items()}

        def value(trial: int) -> float | None:
            try:
                return self._validated(self._training(name, trial, self.study.seeds[0])[0], plain)
            except Diverged:
                return None

        values = all_of(partial(value, trial) for trial in range(len(variant.tune)))
        best = self._best(name, [{"changes": changes} for changes in variant.tune], values)
        if best is None:
            raise Diverged(f"{name}: every trial diverged")
        return best

    def _sampling(self, name: str | None, sampling: RowSampling) -> dict[str, Any]:
        """The settings of sampling, where `best` stands the best ones."""
        candidates = sampling.candidates(self.study.validation)
        if len(candidates) == 1:
            return candidates[0]
        weights = self._weights(name, self.study.seeds[0])
        values = all_of(partial(self._validated, weights, settings) for settings in candidates)
        best = self._best(name or START, [{"sampling": settings} for settings in candidates], values)
        assert best is not None
        return candidates[best]

    def _validated(self, weights: Weights, settings: Mapping[str, Any]) -> float:
        """The metric that chooses, of samples that no figure uses."""
        choice, judge = self.study.validation, self.study.protocol.judges[0]
        assert choice is not None
        metrics = self._judged(judge, weights, settings, choice.samples, choice.sampling_seed, choice.split)["metrics"]
        if choice.metric not in metrics:
            raise VarpiError(f"validation.metric is {choice.metric}, which {judge.key} does not measure; take another")
        return metrics[choice.metric]

    def _best(self, name: str, tried: Sequence[dict[str, Any]], values: Sequence[float | None]) -> int | None:
        """The place of the best value, the first of equals; written down."""
        assert self.study.validation is not None
        sign = 1 if self.study.validation.metric in LOWER_IS_BETTER else -1
        scored = [(sign * value, i) for i, value in enumerate(values) if value is not None]
        best = min(scored)[1] if scored else None
        for i, (one, value) in enumerate(zip(tried, values, strict=True)):
            record = {**one, "value": value, "chosen": i == best}
            if record not in (known := self.choices.setdefault(name, [])):
                known.append(record)
        return best

    # -- sampling and measuring

    def _drawn(
        self, weights: Weights, settings: Mapping[str, Any], count: int, seed: int, split: str
    ) -> tuple[Job, dict[str, Any]]:
        """Samples: their job, and what came of it. split: whose captions are asked for, if captions are."""
        protocol, classes = self.study.protocol, self.pair["num_classes"]
        plain = RowSampling().model_dump()
        own = {key: value for key, value in settings.items() if value != plain[key]}
        name = f"draw/{weights.place}/{_slug(own) or 'plain'}/{count}-seed-{seed}"
        if classes is None:
            name += f"-of-{_slug({'split': split})}"
        sampling = Sampling(**settings, seed=seed)
        first = protocol.samples, protocol.sampling_seeds[0], protocol.split
        shown = SHOWN if (count, seed) == first[:2] and (classes is not None or split == first[2]) else 0
        inputs = {
            **weights.hashes,
            **asdict(sampling),
            "classes": classes,
            "count": count,
            "batch_size": protocol.batch_size,
            "device": self.device,
            **({"shown": shown} if shown else {}),
            **({"captions": [self.study.data.source, split]} if classes is None else {}),
        }
        arguments = weights, self._asked(split), sampling, count, protocol.batch_size, shown, self.device
        job = Job(name, draw_tokens, arguments, inputs, needs=self._needs(weights))
        return job, self.work(job)

    def _asked(self, split: str) -> Subject:
        return Subject(self.pair["num_classes"], self.study.data, split)

    def _measured(self, weights: Weights, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """What every judge sees, by what the study calls it."""
        protocol = self.study.protocol
        found = all_of(
            partial(self._judged, judge, weights, settings, protocol.samples, seed, judge.split or protocol.split)
            for judge in protocol.judges
        )
        return dict(zip(self.judges, found, strict=True))

    def _judged(
        self, judge: Judge, weights: Weights, settings: Mapping[str, Any], count: int, seed: int, split: str
    ) -> dict[str, Any]:
        """What a judge sees of samples beside a split."""
        protocol = self.study.protocol
        draw, drawn = self._drawn(weights, settings, count, seed, split)
        reference = self._reference(judge, split)
        name = f"measure/{draw.name.removeprefix('draw/')}/{_slug({'against': split})}/{judge.name}"
        inputs = {
            "tokens_sha256": drawn["sha256"],
            "tokenizer_sha256": weights.tokenizer_sha256,
            "reference_sha256": reference["sha256"],
            "split": split,
            "metrics": protocol.metrics,
            "batch_size": protocol.batch_size,
            "device": self.device,
            **self.judges[judge.key],
        }
        place = self.output / "jobs" / draw.name
        rest = protocol.metrics, protocol.batch_size, self._cache, self.device
        arguments = (place, weights, self._asked(split), judge, *rest)
        needs = {place / TOKENS: draw, **self._needs(weights)}
        return self.work(Job(name, measure_tokens, arguments, inputs, needs=needs))

    def _reference(self, judge: Judge, split: str) -> dict[str, Any]:
        data, count = self.study.data, self.study.protocol.samples
        inputs = {**data.model_dump(), "split": split, "device": self.device, **self.judges[judge.key]}
        name = f"reference/{_slug({'split': split})}/{judge.name}"
        if judge.name == SHAPES_DETECTOR:
            arguments = self._asked(split), count, judge, self.device
            return self.work(Job(name, see_scenes, arguments, {**inputs, "count": count}))
        return self.work(Job(name, see_reference, (data, split, judge, self._cache, self.device), inputs))

    @property
    def _cache(self) -> Path:
        return self.output / "cache"


@dataclass(frozen=True)
class _Part:
    """What one training seed adds to a row."""

    seed: str
    weights: Weights
    shown: Sequence[Sequence[int]]
    """The tokens of its first samples."""
    measured: Sequence[Mapping[str, Any]]
    """What each judge sees, one a sampling seed."""
    cost: Mapping[str, float]


def _kept(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides what comes of it, but for what it begins with and its seed."""
    values = flatten(recipe.model_dump(mode="json", exclude={"logging", "preview"}))
    for key, plain in _YOUNGER.items():
        if values.get(key, ...) == plain:
            del values[key]
    return {key: value for key, value in values.items() if key not in FREE_TO_CHANGE | OWN}


def _slug(settings: Mapping[str, Any]) -> str:
    """Settings as the name of a folder; long ones, and what no name may hold, with a hash."""
    text = ",".join(f"{key}={value}" for key, value in settings.items())
    plain = re.sub(r"[^A-Za-z0-9=,._+-]", "_", text)
    return (
        plain if plain == text and len(text) < 100 else f"{plain[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    )
