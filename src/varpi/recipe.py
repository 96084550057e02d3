"""The recipe: everything that decides what a run does, read from YAML, checked before any work begins."""

import difflib
import importlib.resources
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from varpi.errors import VarpiError
from varpi.recipes import shipped_recipes


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a whole number, not true or false")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _name_or_fields(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ValueError("must be a name or a mapping of fields")
    return value


Int = Annotated[int, BeforeValidator(_whole_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1)]
Weight = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
Architecture = Annotated[str | dict[str, Any], BeforeValidator(_name_or_fields)]


class Section(BaseModel):
    """A block of the recipe. Unknown keys are refused; a field's sentence is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class GeneratorSection(Section):
    source: str | None = None
    """Checkpoint file, directory, Hub id or embedded name; none: freshly initialized from `architecture`."""
    architecture: Architecture | None = None
    """A name such as llamagen-c2i-xxl, or the fields of LlamaGenConfig; none: what the checkpoint says."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """Replaces the checkpoint's dropout rate."""
    text_encoder: str | None = None
    """T5 directory or Hub id that encodes captions as they come, for a generator that reads caption features."""
    compat: dict[str, bool] = {}
    """Where to follow released code against the model itself; see the generator's file."""


class TokenizerSection(Section):
    source: str | None = None
    """Checkpoint file, directory, Hub id or embedded name; none: freshly initialized from `architecture`."""
    architecture: Architecture | None = None
    """A name such as vq-16, or the fields of VQConfig; none: what the checkpoint says."""


class DataSection(Section):
    source: str
    """A folder of class folders, tar shards or jsonl files; a Hugging Face dataset, parquet, a Hub id; `digits`."""
    image_size: Count
    """Side of the square training images, in pixels."""
    split: str = "train"
    """The split to train on, where the source has splits."""
    image_column: str = "image"
    label_column: str = "label"
    caption_column: str | list[str] | None = None
    """Field of the captions, or several in order of preference; dots reach into JSON (`sentences.0.raw`)."""
    caption_features: str | None = None
    """Folder that `varpi encode captions` filled; conditions are then these features."""
    min_side: Annotated[Int, Field(ge=0)] | None = None
    """Captioned images with a shorter side of fewer pixels are left out; none: image_size."""
    stream: bool = False
    """Read the data in order, as it comes, for sources that are too large to hold."""
    shuffle_buffer: Count | None = None
    """Images that a stream shuffles among, beside its files; none: 1000."""
    workers: Annotated[Int, Field(ge=0)] = 0
    """Processes (for a stream: threads) that read and crop images; 0 reads in the training process."""
    max_bad_fraction: Share = 0.01
    """The run stops when more than this share of the images read so far could not be read."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.stream and self.caption_features is not None:
            raise ValueError("caption_features cannot be looked up for a stream; leave out one of the two")
        if not self.stream and self.shuffle_buffer is not None:
            raise ValueError("shuffle_buffer is for streams; set stream: true or leave it out")
        return self


class Reward(Section):
    """Paper Eq. 10: minus the weighted sum of pixel and perceptual distances. A weight of 0 computes nothing."""

    mse_weight: Weight = 1.0
    """Mean squared error over channels and pixels, images in [-1,1]."""
    perceptual_weight: Weight = 1.0
    l1_weight: Weight = 0.0
    perceptual: Literal["lpips-vgg", "lpips-alex", "digits"] = "lpips-vgg"
    """The network of the perceptual distance; `digits` is the embedded one."""
    perceptual_weights: str | None = None
    """File with the LPIPS trunk's weights; none: torch hub's cache, or a download."""
    decode_batch: Count = 16
    """Token sequences decoded at once; bounds memory, changes no number."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the decoder and the perceptual network."""

    @model_validator(mode="after")
    def _some_reward(self) -> Self:
        if self.mse_weight == self.perceptual_weight == self.l1_weight == 0:
            raise ValueError("every weight is 0; at least one must be positive")
        if self.perceptual_weights is not None and not (
            self.perceptual_weight > 0 and self.perceptual.startswith("lpips")
        ):
            raise ValueError("perceptual_weights is given but no LPIPS network is used")
        return self


class Compat(Section):
    """Where the released code departs from the paper; see docs/paper_map.md."""

    uniform_noise: bool = False
    """Context noise draws from all codes, the true one included (paper Eq. 28 excludes it)."""
    rollout_in_eval: bool = False
    """Sample from a separate pass without dropout, so that the first ratio compares two different networks."""


class VaPi(Section):
    """VA-π (arXiv 2512.19680)."""

    name: Literal["va_pi"]
    group_size: Annotated[Int, Field(ge=2)] = 8
    """G, samples per image; advantages are relative to the group."""
    context_noise: Share = 0.0
    """ξ, probability that a context token is replaced (Eq. 28)."""
    prior: Literal["cross_entropy", "kl"] = "cross_entropy"
    """What holds the generator to its data: cross-entropy of true tokens (Eq. 9), or KL to a frozen copy (Fig. 4)."""
    prior_weight: Weight = 0.1
    """β (Eq. 11); 0 leaves the prior out, and with it the frozen copy."""
    clip_range: Annotated[Float, Field(gt=0, lt=1)] = 0.2
    """ε of the clipped ratio (Eq. 11)."""
    advantage_clip: Annotated[Float, Field(gt=0)] = 5.0
    """Advantages are clamped to this magnitude."""
    policy_mode: Literal["train", "eval"] = "train"
    """Whether the generator's dropout is on in the pass that is differentiated."""
    condition_drop: Share = 0.1
    """Probability that an image's condition is replaced by the null condition."""
    reward: Reward = Reward()
    compat: Compat = Compat()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.compat.rollout_in_eval and self.policy_mode == "eval":
            raise ValueError("compat.rollout_in_eval needs policy_mode: train; in eval mode both passes are the same")
        if self.compat.uniform_noise and self.context_noise == 0:
            raise ValueError("compat.uniform_noise is set but context_noise is 0")
        return self


class NextToken(Section):
    """Plain teacher-forced training: cross-entropy of the true tokens under the true context."""

    name: Literal["next_token"]
    condition_drop: Share = 0.1
    """Probability that an image's condition is replaced by the null condition."""


class VqTokenizer(Section):
    """Trains a VQ tokenizer by reconstruction (VQ-VAE, arXiv 1711.00937, with unit-norm codes)."""

    name: Literal["vq_tokenizer"]
    mse_weight: Weight = 1.0
    perceptual_weight: Weight = 0.0
    """Weight of the embedded `digits` perceptual distance."""
    commitment_weight: Weight = 0.25
    usage_weight: Weight = 0.0
    """Weight of the distance from each code to its nearest latent of the batch, which keeps all codes in use."""


class Classifier(Section):
    """Trains a small convolutional classifier, whose features judge or reward the embedded digits."""

    name: Literal["classifier"]
    channels: tuple[Count, ...] = (16, 32, 64)
    num_classes: Annotated[Int, Field(ge=2)] = 10


MethodSection = Annotated[VaPi | NextToken | VqTokenizer | Classifier, Field(discriminator="name")]


class Lora(Section):
    """Trains low-rank adapters (arXiv 2106.09685) instead of the weights, which are frozen and, in bf16, held so."""

    rank: Count = 16
    alpha: Annotated[Float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    targets: list[str] | None = None
    """Last parts of the names of the linear layers to adapt; none: all of the transformer's blocks."""


class Optimizer(Section):
    """AdamW; norms are not decayed."""

    learning_rate: Annotated[Float, Field(gt=0)]
    weight_decay: Weight = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    gradient_clip: Annotated[Float, Field(gt=0)] = 1.0
    """Largest norm of the whole gradient."""
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to 0 at the last step."""


class Training(Section):
    steps: Count
    """Optimizer updates."""
    batch_size: Count
    """Images per update, over all processes."""
    micro_batch: Count | None = None
    """Images per forward pass in a process; none: its whole share at once. Changes rounding and dropout's masks."""
    updates_per_batch: Count = 1
    """Optimizer updates made from one batch of rollouts."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the generator's forward and backward pass; master weights and optimizer state are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more transformer work."""
    save_every: Count | None = None
    """Steps between checkpoints; none: only at the end or when stopped."""
    keep: Count = 2
    """Checkpoints kept, newest first."""
    max_skipped: Count = 5
    """Updates in a row that may be skipped for a non-finite loss or gradient before the run stops."""

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        for name in ("steps", "save_every"):
            value = getattr(self, name)
            if value is not None and value % self.updates_per_batch:
                raise ValueError(f"{name} is {value}; it must be a multiple of updates_per_batch")
        return self


class Validation(Section):
    """Loss on held-out images, with the best weights kept."""

    split: str = "validation"
    every: Count
    """Steps between validations."""
    images: Count | None = None
    """How many held-out images, from the first; none: all."""
    patience: Count | None = None
    """Stop after this many validations without a better loss."""


class Logging(Section):
    tensorboard: bool = False
    """Write TensorBoard events into the run directory (extra: varpi[tensorboard])."""
    wandb: str | None = None
    """Weights & Biases project to log to (extra: varpi[wandb])."""


class Recipe(Section):
    """One run."""

    method: MethodSection
    data: DataSection
    optimizer: Optimizer
    training: Training
    generator: GeneratorSection | None = None
    tokenizer: TokenizerSection | None = None
    lora: Lora | None = None
    validation: Validation | None = None
    logging: Logging = Logging()
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    """Decides every random draw of the run."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needs = {
            "va_pi": {"generator", "tokenizer"},
            "next_token": {"generator", "tokenizer"},
            "vq_tokenizer": {"tokenizer"},
            "classifier": set(),
        }[self.method.name]
        for name in ("generator", "tokenizer"):
            section = getattr(self, name)
            if (section is not None) != (name in needs):
                raise ValueError(f"method {self.method.name} {'needs a' if name in needs else 'has no'} {name}")
            if section is not None and section.source is None and section.architecture is None:
                raise ValueError(f"{name}.source is missing: give a checkpoint, or an architecture to start afresh")
        if self.lora is not None and "generator" not in needs:
            raise ValueError(f"lora is for generators; method {self.method.name} trains none")
        if self.lora is not None and self.generator is not None and self.generator.source is None:
            raise ValueError("lora adapts a pretrained generator: generator.source is missing")
        if isinstance(self.method, VaPi):
            assert self.generator is not None
            assert self.tokenizer is not None
            for name in ("generator", "tokenizer"):
                if getattr(self, name).source is None:
                    raise ValueError(f"{name}.source is missing: va_pi post-trains a pretrained pair")
        elif self.training.updates_per_batch > 1:
            raise ValueError(f"training.updates_per_batch is for va_pi; {self.method.name} has no rollouts to reuse")
        if self.validation is not None and self.validation.every % self.training.updates_per_batch:
            raise ValueError(
                f"validation.every is {self.validation.every}; it must be a multiple of training.updates_per_batch"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=False), sort_keys=False)


def load_recipe(name_or_path: str | Path, settings: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path, apply `key.path=value` settings, and check everything.

    Values of settings are YAML. Raises VarpiError with one line per mistake.
    """
    where = str(name_or_path)
    if where in shipped_recipes():
        path = Path(str(importlib.resources.files("varpi.recipes") / f"{where}.yaml"))
    else:
        path = Path(where)
        if not path.is_file():
            close = difflib.get_close_matches(where, shipped_recipes(), 1)
            hint = f"did you mean {close[0]}?" if close else f"the shipped ones are {', '.join(shipped_recipes())}"
            raise VarpiError(f"no recipe {where!r}: neither a file nor a shipped recipe; {hint}")
    values = read_yaml(path)
    for setting in settings or []:
        _apply(values, setting)
    return parse_recipe(values, path.name)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a recipe file, unchecked."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise VarpiError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise VarpiError(f"{path}: a recipe is a mapping of sections, not {type(values).__name__}")
    return values


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """A checked recipe from nested dictionaries; `where` names them in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise VarpiError(*(f"{where}: {_explain(problem)}" for problem in error.errors())) from None


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise VarpiError(f"--set {setting!r}: expected key.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise VarpiError(f"--set {key}: {text!r} is not a YAML value") from error
    *parents, last = key.strip().split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise VarpiError(f"--set {key}: {parent} is not a section")
    values[last] = value


def _explain(problem: Any) -> str:
    """One line for one pydantic error: the key as the user wrote it, what it is, what it must be."""
    path = [str(part) for part in problem["loc"]]
    if path[:1] == ["method"] and len(path) > 1 and path[1] in {"va_pi", "next_token", "vq_tokenizer", "classifier"}:
        del path[1]  # pydantic's tag of the union member
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        close = difflib.get_close_matches(path[-1], known, 1)
        hint = f"did you mean {close[0]}?" if close else f"the keys here are {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if problem["type"] in ("missing", "union_tag_not_found"):
        return f"{key}{'.name' if key == 'method' else ''} is missing"
    if problem["type"] == "union_tag_invalid":
        return f"method.name is {problem['ctx']['tag']!r}; it must be one of {problem['ctx']['expected_tags']}"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is {problem['input']!r:.80}; it must be a section of keys and values"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if problem["type"] == "value_error" and not message.startswith("must"):
        return f"{key}: {message}"
    message = message.removeprefix("Input should be ").removeprefix("must be ")
    return f"{key} is {problem['input']!r:.80}; it must be {message}"


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """The fields of the section at a pydantic error location."""
    section: Any = Recipe
    for part in location:
        if isinstance(section, type) and part in section.model_fields:
            section = section.model_fields[part].annotation
            section = _only_section(section)
        elif isinstance(section, tuple):  # the union of methods; the part is the tag
            section = next(s for s in section if get_args(s.model_fields["name"].annotation) == (part,))
    return list(section.model_fields)


def _only_section(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        members: list[Any] = [m for m in get_args(annotation) if isinstance(m, type) and issubclass(m, Section)]
        return tuple(members) if len(members) > 1 else members[0]
    return annotation
