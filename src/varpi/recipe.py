"""The recipe: everything that decides what a run does, read from YAML, checked before any work begins."""

import difflib
import importlib
import importlib.resources
import pkgutil
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from varpi.errors import VarpiError
from varpi.recipes import shipped_recipes
from varpi.runtime.files import read_json
from varpi.runtime.strict_yaml import check_extent, parse_yaml

LARGEST_FILE = 2**20
"""Bytes of a recipe."""
MOST_LINES = 20
"""Of mistakes told at once."""
MOST_PIXELS = 2**36
"""In an update; they are held as float32, three channels each: 768 GiB over all processes."""


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a whole number, not true or false")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def read_architecture(architecture: str | None) -> str | dict[str, Any] | None:
    """The fields of a configuration in a JSON file, where the name ends in .json; any other name as it is.

    Raises VarpiError for a file that cannot be read or holds something else.
    """
    if architecture is None or not architecture.endswith(".json"):
        return architecture
    fields = read_json(Path(architecture).expanduser())
    if not isinstance(fields, dict):
        raise VarpiError(f"{architecture}: is a JSON {type(fields).__name__}, not the fields of a configuration")
    check_extent(fields)
    return fields


def _name_or_fields(value: Any) -> Any:
    if not isinstance(value, str | dict):
        raise ValueError("must be a name or a mapping of fields")
    return read_architecture(value) if isinstance(value, str) else value


Int = Annotated[int, BeforeValidator(_whole_number)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[Int, Field(ge=1, le=2**31)]
BatchSize = Annotated[Int, Field(ge=1, le=2**20)]
"""Of images or sequences at once."""
Weight = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
NameOrFields = Annotated[str | dict[str, Any], BeforeValidator(_name_or_fields)]


class Section(BaseModel):
    """A block of the recipe. Unknown keys are refused; a field's sentence is its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=False), sort_keys=False)


CheckedSection = TypeVar("CheckedSection", bound=Section)


class GeneratorSection(Section):
    source: str | None = None
    """Checkpoint file, directory, Hub id or embedded name; none: freshly initialized from `architecture`."""
    architecture: NameOrFields | None = None
    """A name such as llamagen-c2i-xxl, or the fields of LlamaGenConfig, here or in a .json file; none: what the
    checkpoint says."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """Replaces the checkpoint's dropout rate."""
    text_encoder: str | None = None
    """T5 directory or Hub id that encodes captions as they come, for a generator that reads caption features."""
    compat: dict[str, bool] = {}
    """Where to follow released code against the model itself; see the generator's file."""


class TokenizerSection(Section):
    source: str | None = None
    """Checkpoint file, directory, Hub id or embedded name; none: freshly initialized from `architecture`."""
    architecture: NameOrFields | None = None
    """A name such as vq-16, or the fields of VQConfig, here or in a .json file; none: what the checkpoint says."""


class DataSection(Section):
    source: str
    """A folder of class folders, tar shards or jsonl files; a Hugging Face dataset, parquet, a Hub id; `digits`,
    `shapes`."""
    image_size: Annotated[Int, Field(ge=1, le=2**14)]
    """Side of the square training images, in pixels."""
    split: str = "train"
    """The split to train on, where the source has splits."""
    image_column: str = "image"
    label_column: str = "label"
    caption_column: str | list[str] | None = None
    """Field of the captions, or several in order of preference; dots reach into JSON (`sentences.0.raw`)."""
    caption_features: str | None = None
    """Folder that `varpi encode captions` filled; conditions are then these features."""
    classes: str | list[str] | None = None
    """The names of all classes in the order of their ids: a list, a file with one a line, or `imagenet`."""
    min_side: Annotated[Int, Field(ge=0)] | None = None
    """Captioned images with a shorter side of fewer pixels are left out; none: image_size."""
    stream: bool = False
    """Read the data in order, as it comes, for sources that are too large to hold."""
    shuffle_buffer: Annotated[Int, Field(ge=1, le=2**24)] | None = None
    """Images that a stream shuffles among, beside its files; none: 1000."""
    lanes: Annotated[Int, Field(ge=1, le=2**12)] | None = None
    """Sequences that a stream is read as, each with its own shuffle_buffer; any number of processes that divides it
    reads the same images in the same order, and continues the run. None: one for each process, as many to the end."""
    flip: bool = False
    """Train on every image and on its mirror image; for sources with classes."""
    workers: Annotated[Int, Field(ge=0, le=2**10)] = 0
    """Processes (for a stream: threads) that read and crop images; 0 reads in the training process."""
    max_bad_fraction: Share = 0.01
    """The run stops when more than this share of the images read so far could not be read."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.stream and self.caption_features is not None:
            raise ValueError("caption_features cannot be looked up for a stream; leave out one of the two")
        if not self.stream and self.shuffle_buffer is not None:
            raise ValueError("shuffle_buffer is for streams; set stream: true or leave it out")
        if not self.stream and self.lanes is not None:
            raise ValueError("lanes is for streams; set stream: true or leave it out")
        if self.stream and self.flip:
            raise ValueError("flip needs data that can be looked up; leave out one of flip and stream")
        return self


class MethodSection(Section):
    """What the settings of every method share and declare.

    A method is a module of `varpi.methods`, named as recipes name it, with its `Settings`, a subclass of this one, and
    `from_recipe`. It is found by that name; nothing else knows of it.
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Which of the sections `generator` and `tokenizer` it has; the others are refused."""
    pretrained: ClassVar[bool] = False
    """Whether what it needs must come from checkpoints."""
    trains: ClassVar[str] = "generator"
    """Which one it trains, where it needs both: a run is those weights with the other's source."""
    reuses_rollouts: ClassVar[bool] = False
    """Whether it can make several updates from one batch."""
    rewards_held_out: ClassVar[bool] = False
    """Whether held-out images have a reward beside their loss."""

    name: str
    """Of the method."""

    @property
    def follows_steps(self) -> bool:
        """Whether what a step does depends on how many there will be."""
        return False

    def check(self, recipe: "Recipe") -> None:
        """Raise ValueError when these settings contradict another section."""


class Lora(Section):
    """Trains low-rank adapters (arXiv 2106.09685) instead of the weights, which are frozen and, in bf16, held so."""

    rank: Annotated[Int, Field(ge=1, le=2**16)] = 16
    alpha: Annotated[Float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Of the adapters' inputs."""
    targets: list[str] | None = None
    """Last parts of the names of the linear layers to adapt; none: all of the transformer's blocks."""


class Optimizer(Section):
    """AdamW; norms are not decayed."""

    learning_rate: Annotated[Float, Field(gt=0)]
    """After the warm-up."""
    weight_decay: Weight = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[Float, Field(gt=0)] = 1e-8
    state_precision: Literal["fp32", "bf16"] = "fp32"
    """Of the two moments; bf16 halves them, rounded at random. Weights, and what is computed, stay fp32."""
    gradient_clip: Annotated[Float, Field(gt=0)] = 1.0
    """Largest norm of the whole gradient."""
    warmup_steps: Annotated[Int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up; cosine falls to 0 at the last step."""


class Training(Section):
    steps: Count
    """Optimizer updates."""
    batch_size: BatchSize
    """Images per update, over all processes."""
    micro_batch: BatchSize | None = None
    """Images per forward pass in a process; none: its whole share at once. Changes rounding and dropout's masks, and
    what two methods take among the images of a pass: vq_tokenizer's usage, and the means of the detector."""
    updates_per_batch: Count = 1
    """Optimizer updates made from one batch of rollouts."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the generator's forward and backward pass; master weights are always fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more transformer work."""
    compile: bool = False
    """Compile the transformer's blocks (torch.compile): the same curve but for rounding, after a first step of a minute
    or more."""
    shard_over: Literal["all", "node"] = "all"
    """The processes over which weights, gradients and optimizer state are sharded: all, or those of a node, so that
    each node has a copy (HSDP): more memory; between nodes only gradients travel, once an update."""
    save_every: Count | None = None
    """Steps between checkpoints; none: only at the end or when stopped."""
    save_in_background: bool = False
    """Train on while a checkpoint is written, from a copy of weights and optimizer state in main memory."""
    keep: Count = 2
    """Checkpoints kept, newest first."""
    ema: Annotated[Float, Field(gt=0, lt=1)] | None = None
    """Decay of an average of the weights over the updates, 0.99 say, which is then validated, previewed and written as
    the model; none: the weights themselves."""
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
    """Loss on held-out images, and their reward where the method has one. It changes no number of training."""

    split: str = "validation"
    every: Count
    """Steps between validations."""
    images: Count | None = None
    """How many held-out images, spread evenly over the split (of a streamed table, its first); none: all."""
    best_by: Literal["loss", "reward"] | None = "loss"
    """Which of the two says what the best weights are, which the run gives back; null: it gives back the last."""
    patience: Count | None = None
    """Stop after this many validations without a better one."""

    @model_validator(mode="after")
    def _patience_of_something(self) -> Self:
        if self.patience is not None and self.best_by is None:
            raise ValueError("patience is for runs that look for the best weights; set best_by to loss or reward")
        return self


class Preview(Section):
    """Pictures of a run while it trains, in RUN/previews and on its page, RUN/live.html. They change no number of it.

    Of each image four, one below the other: itself, through the tokenizer, drawn by the generator under teacher
    forcing, and generated freely for its class or caption. The random numbers are the same every time.
    """

    every: Count
    """Steps between previews; there is one before the first step and one after the last."""
    images: Annotated[Int, Field(ge=1, le=64)] = 8
    """How many, spread evenly over the split."""
    split: str = "validation"
    guidance_scale: Annotated[Float, Field(ge=0)] = 1.0
    """Of those that are generated; up to 1 is no guidance."""


class Logging(Section):
    tensorboard: bool = False
    """Write TensorBoard events into the run directory (extra: varpi[tensorboard])."""
    wandb: str | None = None
    """Weights & Biases project to log to (extra: varpi[wandb])."""


def method_settings(name: Any) -> type[MethodSection] | None:
    """The settings of the method of this name; None when there is none."""
    if name not in _modules_of_methods():
        return None
    return getattr(importlib.import_module(f"varpi.methods.{name}"), "Settings", None)


def method_names() -> list[str]:
    """All methods, by name."""
    return [name for name in _modules_of_methods() if method_settings(name) is not None]


def _modules_of_methods() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module("varpi.methods").__path__))


def _own_settings(value: Any) -> Any:
    """The settings of the method that is named, in its own class."""
    if not isinstance(value, dict):
        return value
    if value.get("name") is None:
        problem: Any = {"type": "missing", "loc": ("name",), "input": value}
    elif (settings := method_settings(value["name"])) is not None:
        return settings.model_validate(value)
    else:
        names = ", ".join(map(repr, method_names()))
        error = PydanticCustomError("no_method", "must be one of {names}", {"names": names})
        problem = {"type": error, "loc": ("name",), "input": value["name"]}
    raise ValidationError.from_exception_data("method", [problem])


class Recipe(Section):
    """One run."""

    method: Annotated[SerializeAsAny[MethodSection], BeforeValidator(_own_settings)]
    data: DataSection
    optimizer: Optimizer
    training: Training
    generator: GeneratorSection | None = None
    tokenizer: TokenizerSection | None = None
    lora: Lora | None = None
    validation: Validation | None = None
    preview: Preview | None = None
    logging: Logging = Logging()
    seed: Annotated[Int, Field(ge=0, lt=2**63)] = 0
    """Decides every random draw of the run."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        method = self.method
        for name in ("generator", "tokenizer"):
            section = getattr(self, name)
            needed = name in method.needs
            if (section is not None) != needed:
                raise ValueError(f"method {method.name} {'needs a' if needed else 'has no'} {name}")
            if section is None or section.source is not None:
                continue
            if method.pretrained:
                raise ValueError(f"{name}.source is missing: {method.name} post-trains a pretrained pair")
            if section.architecture is None:
                raise ValueError(f"{name}.source is missing: give a checkpoint, or an architecture to start afresh")
        if self.lora is not None and self.generator is None:
            raise ValueError(f"lora is for generators; method {method.name} trains none")
        if self.lora is not None and self.generator is not None and self.generator.source is None:
            raise ValueError("lora adapts a pretrained generator: generator.source is missing")
        for name in ("compile", "gradient_checkpointing"):
            if getattr(self.training, name) and (self.generator is None or method.trains != "generator"):
                raise ValueError(f"training.{name} is for generators; method {method.name} trains none")
        if self.training.updates_per_batch > 1 and not method.reuses_rollouts:
            raise ValueError(
                f"training.updates_per_batch is {self.training.updates_per_batch}, but method {method.name} has no "
                "rollouts to reuse"
            )
        if self.data.lanes is not None and self.training.batch_size % self.data.lanes:
            raise ValueError(
                f"training.batch_size is {self.training.batch_size}; it must be a multiple of data.lanes, "
                f"{self.data.lanes}"
            )
        if self.validation is not None and self.validation.every % self.training.updates_per_batch:
            raise ValueError(
                f"validation.every is {self.validation.every}; it must be a multiple of training.updates_per_batch"
            )
        if self.validation is not None and self.validation.best_by == "reward" and not method.rewards_held_out:
            raise ValueError(f"validation.best_by is reward, but method {method.name} has none for held-out images")
        if self.preview is not None and "tokenizer" not in method.needs:
            raise ValueError(f"preview is for methods with a tokenizer; {method.name} has none")
        if self.preview is not None and self.preview.every % self.training.updates_per_batch:
            raise ValueError(
                f"preview.every is {self.preview.every}; it must be a multiple of training.updates_per_batch"
            )
        images, side = self.training.batch_size, self.data.image_size
        if images * side**2 > MOST_PIXELS:
            raise ValueError(
                f"training.batch_size is {images} and data.image_size {side}: an update of more than {MOST_PIXELS} "
                "pixels; make one of the two smaller"
            )
        method.check(self)
        return self


def load_recipe(name_or_path: str | Path, settings: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name or a YAML file by path, apply `key.path=value` settings, and check everything.

    Values of settings are YAML. Raises VarpiError with one line per mistake.
    """
    path = find_recipe(name_or_path)
    values = read_yaml(path)
    for setting in settings or []:
        apply_setting(values, setting)
    return parse_recipe(values, path.name)


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe, or one by its path."""
    where = str(name_or_path)
    if where in shipped_recipes():
        return Path(str(importlib.resources.files("varpi.recipes") / f"{where}.yaml"))
    if not Path(where).exists():
        close = difflib.get_close_matches(where, shipped_recipes(), 1)
        hint = f"did you mean {close[0]}?" if close else f"the shipped ones are {', '.join(shipped_recipes())}"
        raise VarpiError(f"no recipe {where!r}: neither a file nor a shipped recipe; {hint}")
    return Path(where)


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a recipe file, unchecked."""
    if not path.is_file():
        raise VarpiError(f"{path}: {'is no regular file' if path.exists() else 'there is no such file'}")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise VarpiError(f"{path}: has {size} bytes; a recipe has at most {LARGEST_FILE}")
    try:
        values = parse_yaml(path.read_bytes())
        check_extent(values)
    except (OSError, VarpiError) as error:
        raise VarpiError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(values, dict):
        raise VarpiError(f"{path}: a recipe is a mapping of sections, not {type(values).__name__}")
    return values


def parse_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """A checked recipe from nested dictionaries; `where` names them in errors."""
    return parse_section(Recipe, values, where)


def parse_section(kind: type[CheckedSection], values: dict[str, Any], where: str) -> CheckedSection:
    """A checked section of this kind. Raises VarpiError with one line per mistake, each beginning with `where`."""
    try:
        check_extent(values)
        return kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        lines = [f"{where}: {_explain(problem, values, kind)}" for problem in problems[:MOST_LINES]]
        if len(problems) > MOST_LINES:
            lines.append(f"{where}: {len(problems) - MOST_LINES} more mistakes")
        raise VarpiError(*lines) from None
    except VarpiError as error:
        raise VarpiError(f"{where}: {error}") from None


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Put `key.path=value`, of which the value is YAML, into nested dictionaries."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise VarpiError(f"--set {setting!r}: expected key.path=value")
    try:
        value = parse_yaml(text)
    except VarpiError as error:
        raise VarpiError(f"--set {key}: {text!r:.80} is not a YAML value ({error})") from None
    *parents, last = key.strip().split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise VarpiError(f"--set {key}: {parent} is not a section")
    values[last] = value


def _explain(problem: Any, values: dict[str, Any], kind: type[Section]) -> str:
    """One line for one pydantic error: the key as the user wrote it, what it is, what it must be."""
    key = ".".join(f"{part:.40}" if isinstance(part, str) else str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1], values, kind)
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, 1)
        hint = f"did you mean {close[0]}?" if close else f"the keys here are {', '.join(known)}"
        return f"unknown key {key}; {hint}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is {problem['input']!r:.80}; it must be a section of keys and values"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:
        return message
    if problem["type"] == "value_error" and not message.startswith("must"):
        return f"{key}: {message}"
    message = message.removeprefix("Input should be ").removeprefix("must be ")
    return f"{key} is {problem['input']!r:.80}; it must be {message}"


def _known_keys(location: tuple[Any, ...], values: dict[str, Any], kind: type[Section]) -> list[str]:
    """The fields of the section at a pydantic error location."""
    section: Any = kind
    for part in location:
        if section is Recipe and part == "method":
            section = method_settings(values["method"]["name"])
        elif part in section.model_fields:  # else a name or a number that the user gave, within a mapping or a list
            annotation = section.model_fields[part].annotation
            members = (annotation, *get_args(annotation))  # of `Section | None`, `dict[str, Section]`, `list[Section]`
            section = next((m for m in members if isinstance(m, type) and issubclass(m, Section)), section)
    return list(section.model_fields)
