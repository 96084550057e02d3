"""What a study file may say, checked before any work begins: variants, training seeds, one protocol, and trials.

A variant is a recipe with changes, trained from the start pair or from another variant's weights, or only another way
to sample. Whatever its recipe says of the start pair, of the data's place and of the seed is replaced by the study's.
"""

import difflib
import importlib.resources
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from varpi.errors import VarpiError
from varpi.recipe import (
    BatchSize,
    Count,
    Float,
    Int,
    Recipe,
    Section,
    apply_setting,
    load_recipe,
    parse_recipe,
    parse_section,
    read_yaml,
)
from varpi.studies import shipped_studies
from varpi.training.run_directory import FREE_TO_CHANGE

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
START = "start"
"""What the pair that a study begins with is called among its weights."""
BEST = "best"
OWN = {"seed", "generator.source", "generator.architecture", "tokenizer.source", "tokenizer.architecture"}
"""What the study says in the place of its recipes."""

Seed = Annotated[Int, Field(ge=0, lt=2**63)]
Setting = Annotated[Float, Field(gt=0)] | Literal["best"]


class StartPair(Section):
    """The pretrained pair that every variant begins with."""

    generator: str
    """Checkpoint file, run directory, Hub id or embedded name."""
    tokenizer: str
    """The same of its tokenizer."""


class StudyData(Section):
    """Where training and reference images are; takes the place of what the recipes say."""

    source: str
    """As a recipe's data.source."""
    image_size: Count
    image_column: str = "image"
    label_column: str = "label"


SHAPES_DETECTOR = "shapes-detector"


class Judge(Section):
    """A network that measures samples. None of them may be a reward."""

    name: str
    """As `varpi evaluate --features` takes it; or shapes-detector, by which GenEval's rules judge what a generator
    draws that is conditioned on the captions of shapes."""
    weights: str | None = None
    """File or directory, where the network needs one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network; the detector knows fp32 alone."""
    split: str | None = None
    """Of the data, in the place of the protocol's."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.name == SHAPES_DETECTOR and self.precision != "fp32":
            raise ValueError(f"precision is {self.precision}; {SHAPES_DETECTOR} knows fp32 alone")
        return self

    @property
    def key(self) -> str:
        """What the study calls it."""
        return self.name if self.split is None else f"{self.name}-{self.split}"


Measure = Literal[
    "frechet_distance",
    "precision",
    "recall",
    "class_agreement",
    "inception_score",
    "kernel_distance",
    "overall",
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attr",
]
LOWER_IS_BETTER = {"frechet_distance", "kernel_distance"}


class Protocol(Section):
    """How every row is measured."""

    split: str = "test"
    """Of the data: the reference, which nothing trains on or is chosen by."""
    samples: Count
    """A sampling seed, as many of each class; of a generator of captions, one for each of the split's first."""
    sampling_seeds: Annotated[list[Seed], Field(min_length=1)]
    judges: Annotated[list[Judge], Field(min_length=1)]
    """The first one's `validation.metric` chooses."""
    metrics: Annotated[list[Measure], Field(min_length=1)]
    """A judge that has nothing to compute one from is shown without it."""
    batch_size: BatchSize = 100
    """Images sampled, decoded and measured at once."""


class Choice(Section):
    """How settings are chosen: on another split, by fewer samples, from a seed that no figure uses."""

    split: str = "validation"
    samples: Count
    sampling_seed: Seed
    metric: Measure = "frechet_distance"
    temperatures: tuple[Annotated[Float, Field(gt=0)], ...] = ()
    """Tried where a variant's temperature is `best`."""
    guidance_scales: tuple[Annotated[Float, Field(ge=1)], ...] = ()
    """Tried where a variant's guidance scale is `best`, and for every trained row; 1 is no guidance."""


class RowSampling(Section):
    """How a row is sampled; `best` is chosen on the validation split."""

    temperature: Setting = 1.0
    guidance_scale: Setting = 1.0
    top_k: Annotated[Int, Field(ge=0)] = 0
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0

    def candidates(self, choice: Choice | None) -> list[dict[str, Any]]:
        """The settings of `Sampling` that are to be tried; a single one where nothing is to be chosen."""
        grids = {"temperature": "temperatures", "guidance_scale": "guidance_scales"}
        values = {
            name: getattr(choice, grids[name]) if name in grids and value == BEST else [value]
            for name, value in self.model_dump().items()
        }
        return [dict(zip(values, several, strict=True)) for several in itertools.product(*values.values())]


class Variant(Section):
    """One row: a recipe carried out, or a way to sample."""

    label: str | None = None
    """What the page calls it; none: its name."""
    note: str = ""
    """A line below the label."""
    recipe: str | None = None
    """Of the training: a shipped name or a file; none: nothing is trained."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes of the recipe, {key.path: value}; another `method.name` takes the place of the whole method."""
    tune: tuple[dict[str, Any], ...] = ()
    """Further changes to choose among on the validation split, one trial each."""
    after: str | None = None
    """The variant whose weights it begins with; none: the start pair."""
    sampling: RowSampling = RowSampling()

    @field_validator("set", mode="after")
    @classmethod
    def _flat_set(cls, value: dict[str, Any]) -> dict[str, Any]:
        return flatten(value)

    @field_validator("tune", mode="after")
    @classmethod
    def _flat_tune(cls, value: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        return tuple(flatten(trial) for trial in value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.recipe is None and (self.set or self.tune):
            raise ValueError(f"{'set' if self.set else 'tune'} changes a recipe, and there is none")
        if len({repr(sorted(trial.items())) for trial in self.tune}) < len(self.tune):
            raise ValueError("tune lists one trial twice")
        return self


class Study(Section):
    """A study file."""

    title: str
    paragraph: str = ""
    """What it asks, for the page."""
    start: StartPair
    data: StudyData
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Training seeds, the same for every variant; the first one's runs choose among trials and sampling settings."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes of all recipes that have the key, {key.path: value}."""
    protocol: Protocol
    validation: Choice | None = None
    compare_with: str | None = None
    """The trained variant that the others are compared with, seed by seed, beside the start."""
    variants: Annotated[dict[str, Variant], Field(min_length=1)]
    _part: bool = PrivateAttr(default=False)
    """Whether variants were left out, which `set` may be for."""

    @field_validator("set", mode="after")
    @classmethod
    def _flat_set(cls, value: dict[str, Any]) -> dict[str, Any]:
        return flatten(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, seeds in (("seeds", self.seeds), ("protocol.sampling_seeds", self.protocol.sampling_seeds)):
            if len(set(seeds)) < len(seeds):
                raise ValueError(f"{name} lists a seed twice")
        judges = [judge.key for judge in self.protocol.judges]
        if len(set(judges)) < len(judges):
            raise ValueError("protocol.judges lists a network twice")
        choice = self.validation
        if choice is not None:
            reported = {self.protocol.split, *(judge.split for judge in self.protocol.judges)}
            if choice.split in reported:
                raise ValueError(f"validation.split is {choice.split}, which the protocol reports on; take another")
            if choice.sampling_seed in self.protocol.sampling_seeds:
                raise ValueError(
                    f"validation.sampling_seed is {choice.sampling_seed}, which figures use; take another one"
                )
            if choice.metric not in self.protocol.metrics:
                raise ValueError(f"validation.metric is {choice.metric}, which protocol.metrics does not list")
        labels = [variant.label or name for name, variant in self.variants.items()]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"variants: two are labelled {label}; a reader could not tell them apart")
        trials = {len(variant.tune): name for name, variant in self.variants.items() if variant.tune}
        if len(trials) > 1:
            said = " and ".join(f"{name} {count}" for count, name in trials.items())
            raise ValueError(f"tune: {said} trials; each method gets the same number")
        for name, variant in self.variants.items():
            self._check_variant(name, variant)
        if self.compare_with is not None:
            other = self.variants.get(self.compare_with)
            if other is None or other.recipe is None:
                raise ValueError(f"compare_with is {self.compare_with}; it must be one of the trained variants")
        return self

    def _check_variant(self, name: str, variant: Variant) -> None:
        where = f"variants.{name}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where}: a variant's name is of small letters, digits, _ and -")
        if name == START:
            raise ValueError(f"{where}: {START} is what the start pair is called; take another name")
        grids = {"temperature": "temperatures", "guidance_scale": "guidance_scales"}
        for setting, grid in grids.items():
            if getattr(variant.sampling, setting) == BEST and not getattr(self.validation, grid, None):
                raise ValueError(f"{where}.sampling.{setting} is best, but validation.{grid} lists nothing to try")
        if variant.tune and self.validation is None:
            raise ValueError(f"{where}.tune: there is no validation to choose by")
        seen = [name]
        while variant.after is not None:
            if variant.after not in self.variants:
                raise ValueError(f"variants.{seen[-1]}.after is {variant.after}, and there is no such variant")
            if variant.after in seen:
                raise ValueError(f"{where}.after: {' after '.join([*seen, variant.after])} has no beginning")
            seen.append(variant.after)
            variant = self.variants[variant.after]

    def only(self, names: Sequence[str]) -> "Study":
        """The same with some of the variants, and those that these begin with; compared with one of them, or none."""
        for name in names:
            if name not in self.variants:
                raise VarpiError(f"--only {name}: there is no such variant, only {', '.join(self.variants)}")
        kept, rest = set[str](), [*names]
        while rest:
            kept.add(name := rest.pop())
            if (after := self.variants[name].after) is not None:
                rest.append(after)
        variants = {name: variant for name, variant in self.variants.items() if name in kept}
        compare_with = self.compare_with if self.compare_with in kept else None
        part = self.model_copy(update={"variants": variants, "compare_with": compare_with})
        part._part = True
        return part

    def recipes(self, where: str) -> dict[str, list[Recipe]]:
        """The recipes of the trained variants, checked: one for each trial, without its seed and its start.

        Raises VarpiError for a recipe that is refused, for a change of the study that no recipe has the key of, and for
        variants that differ, but for their methods, in what neither says.
        """
        found: dict[str, list[Recipe]] = {}
        used = set[str]()
        for name, variant in self.variants.items():
            if variant.recipe is None:
                continue
            found[name] = []
            for trial in variant.tune or [{}]:
                changes = {**variant.set, **trial}
                for key in changes:
                    if key in OWN or key in {f"data.{field}" for field in StudyData.model_fields}:
                        raise VarpiError(f"{where}: variants.{name} sets {key}, which the study says for all")
                values = load_recipe(variant.recipe).model_dump(mode="json")
                if values["validation"] is not None and values["validation"]["best_by"] is None:
                    values["validation"] = None  # it would tell, and decide nothing
                what = f"{where}: variants.{name}"
                if changes.get("method.name", values["method"]["name"]) != values["method"]["name"]:
                    values["method"] = {}  # nothing of the other method's settings
                    for key, value in changes.items():
                        if key.startswith("method."):
                            _put(values, key, value)
                    values = parse_recipe(values, what).model_dump(mode="json")
                for key, value in self.set.items():
                    if _has(values, key):
                        _put(values, key, value)
                        used.add(key)
                values["data"].update(self.data.model_dump())
                values["seed"] = 0
                for part in ("generator", "tokenizer"):
                    if values[part] is not None:
                        values[part].update(source=getattr(self.start, part), architecture=None)
                for key, value in changes.items():
                    _put(values, key, value)
                found[name].append(parse_recipe(values, what))
        if not self._part and (missing := [key for key in self.set if key not in used]):
            raise VarpiError(f"{where}: set.{missing[0]}: no recipe of this study has that key")
        self._check_differences(found, where)
        return found

    def _check_differences(self, recipes: Mapping[str, Sequence[Recipe]], where: str) -> None:
        flat = {name: flatten(several[0].model_dump(mode="json", exclude={"method", "logging"}))
                for name, several in recipes.items()}  # fmt: skip
        said = {name: {*variant.set, *(key for trial in variant.tune for key in trial)}
                for name, variant in self.variants.items()}  # fmt: skip
        for key in dict.fromkeys(key for values in flat.values() for key in values):
            if key in FREE_TO_CHANGE | OWN:
                continue
            silent = [name for name in flat if key in flat[name] and key not in said[name]]
            for name in silent[1:]:
                first = silent[0]
                if flat[name][key] != flat[first][key]:
                    raise VarpiError(
                        f"{where}: {first} and {name} differ in {key} ({flat[first][key]} and {flat[name][key]}), "
                        "which neither sets: set it for one of them, or for all"
                    )


def load_study(name_or_path: str, settings: Sequence[str] = ()) -> tuple[Study, str]:
    """Read a shipped study by name or a YAML file by path, and apply `key.path=value` settings.

    Returns the study and what errors call it. Raises VarpiError with one line per mistake.
    """
    path = Path(name_or_path)
    if name_or_path in shipped_studies():
        path = Path(str(importlib.resources.files("varpi.studies") / f"{name_or_path}.yaml"))
    elif not path.exists():
        close = difflib.get_close_matches(name_or_path, shipped_studies(), 1)
        hint = f"did you mean {close[0]}?" if close else f"the shipped ones are {', '.join(shipped_studies())}"
        raise VarpiError(f"no study {name_or_path!r}: neither a file nor a shipped study; {hint}")
    values = read_yaml(path)
    for part in (values, *_mappings(values.get("variants"))):
        if isinstance(part.get("set"), dict):
            part["set"] = _nested(part["set"], path.name)
    for setting in settings:
        apply_setting(values, setting)
    return parse_section(Study, values, path.name), path.name


def flatten(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} and {"a.b": 1} as {"a.b": 1}. Raises ValueError for a key given in both ways."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = flatten(value, f"{before}{key}.") if isinstance(value, dict) and value else {f"{before}{key}": value}
        for name in inner:
            if name in flat:
                raise ValueError(f"{name} is given twice")
        flat |= inner
    return flat


def _nested(values: dict[str, Any], where: str) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}, so that a setting from the command line replaces it."""
    try:
        flat = flatten(values)
    except ValueError as error:
        raise VarpiError(f"{where}: set: {error}") from None
    made: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        section = made
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise VarpiError(f"{where}: set: {key} and {parent} contradict each other")
        section[last] = value
    return made


def _mappings(values: Any) -> list[dict[str, Any]]:
    return [value for value in values.values() if isinstance(value, dict)] if isinstance(values, dict) else []


def _has(values: dict[str, Any], key: str) -> bool:
    """Whether nested dictionaries have a dotted key."""
    section: Any = values
    for part in key.split("."):
        if not isinstance(section, dict) or part not in section:
            return False
        section = section[part]
    return True


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = value
