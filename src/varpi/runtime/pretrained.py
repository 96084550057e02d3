"""What `varpi.weights` and a family of models tell each other: a checkpoint that was read, a model that can be saved.

A *family* is one module of `varpi.generators` or `varpi.tokenizers` that holds a `Family` called FAMILY. It is found by
that name, and nothing else needs to know of it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.runtime.sources import few

Config = TypeVar("Config")


class Stored(nn.Module):
    """A model whose weights can be saved. What it says here suits one that has a configuration of plain fields."""

    family: ClassVar[str] = ""
    """The name of its family; empty: it has no file format."""
    hf_config: dict[str, Any] | None = None
    """What config.json holds, for a model that is saved in transformers' layout; None: in varpi's own."""
    folder: Path | None = None
    """Where the files of its text tokenizer lie; they are copied beside saved weights."""

    def stored_config(self) -> dict[str, Any]:
        """What is written into the file, for the family to make the model again."""
        return self.hf_config or dataclasses.asdict(self.config)  # pyright: ignore[reportArgumentType]

    def name_in_file(self, name: str) -> str | None:
        """The original files' name of an entry of the state dict; None for one that is not written, as a tied copy."""
        return name

    def original_content(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """What `torch.save` writes in an original file of these tensors."""
        return tensors

    def reset_tables(self) -> None:
        """Make again what no checkpoint holds; needed after construction on the meta device."""


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint as it was read, and what the caller says of it, for a family to make sense of."""

    where: str
    """What to call it in errors."""
    tensors: dict[str, Tensor]
    """By their names in the file; memory-mapped perhaps, never to be modified."""
    config: dict[str, Any] = field(default_factory=dict)
    """What it says of itself: the description that varpi wrote, or the config.json beside it; empty: nothing."""
    folder: Path | None = None
    """Where the files of its text tokenizer lie, if there are any."""
    compat: dict[str, bool] = field(default_factory=dict)
    """Where to follow released code against its own model; each family knows its own names."""
    architecture: Any = None
    """As the caller gave it: one of the family's names, a mapping of fields, or a configuration; None: not given."""
    image_size: int | None = None
    """As the caller gave it, in pixels per side."""

    def resolve(
        self,
        kind: type[Config],
        facts: Mapping[str, Any],
        *,
        named: Callable[[str], Config],
        implied: Callable[[], Config],
        unseen: tuple[str, ...],
    ) -> tuple[Config, str]:
        """The configuration, a dataclass `kind`, and what to call its source: the caller, the file, or its tensors.

        facts: the fields that the tensors reveal. named: the configuration of an architecture's name. implied: that
        of the facts alone. unseen: fields that tensors do not show; the file's own word on them counts.

        Raises VarpiError where two sources contradict each other.
        """
        stored = config_of(kind, self.config, f"{self.where}: its configuration") if self.config else None
        if isinstance(self.architecture, kind):
            config, said = self.architecture, f"the given {kind.__name__}"
        elif isinstance(self.architecture, Mapping):
            config, said = config_of(kind, self.architecture, "architecture"), "the given architecture"
        elif self.architecture is not None:
            config, said = named(self.architecture), f"architecture {self.architecture!r}"
        elif stored is not None:
            config, said = stored, "the configuration inside the file"
        else:
            config, said = implied(), "what its tensors imply"
        self._refuse_contradiction("the tensors say", facts, said, config)
        if stored is not None:
            inside = {name: getattr(stored, name) for name in unseen}
            self._refuse_contradiction("the configuration inside the file says", inside, said, config)
        return config, said

    def _refuse_contradiction(self, one: str, facts: Mapping[str, Any], other: str, config: Any) -> None:
        differing = [name for name, value in facts.items() if value != getattr(config, name)]
        if differing:
            left = ", ".join(f"{name} {facts[name]}" for name in differing)
            right = ", ".join(f"{name} {getattr(config, name)}" for name in differing)
            raise VarpiError(f"{self.where}: {one} {left}, but {other} says {right}")


def config_of(kind: type[Config], fields: Mapping[str, Any], what: str) -> Config:
    """A configuration, a dataclass, from a mapping of its fields; `what` names the mapping in errors."""
    known = [known.name for known in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    if unknown := [str(name) for name in fields if name not in known]:
        raise VarpiError(
            f"{what} has fields that this varpi does not know: {few(unknown)}; it knows {', '.join(known)}"
        )
    try:
        return kind(**fields)
    except (VarpiError, TypeError, ValueError, ArithmeticError) as error:
        message = str(error).removeprefix(f"{kind.__name__}.__init__() ")
        raise VarpiError(f"{what} is not valid: {message}") from error


def whole_number(kind: str, name: str, value: Any, most: int) -> None:
    """Refuse a field of a configuration that is no whole number from 1 to `most`, before it takes memory or time."""
    if type(value) is not int:
        raise VarpiError(f"{kind}: {name} is {value!r:.80}; it must be a whole number")
    if value < 1:
        raise VarpiError(f"{kind}: {name} is {value}; it must be at least 1")
    if value > most:
        raise VarpiError(f"{kind}: {name} is {value}; it must be at most {most}")


class Assembled(NamedTuple):
    """What a family makes of a checkpoint."""

    model: Stored
    """On the meta device."""
    tensors: dict[str, Tensor]
    """Its weights, by the names in its state dict or those that `name_in_file` gives; what is left over as it was."""
    said: str = "its configuration"
    """Where its shape is from, for errors about tensors that do not fit it."""
    name_in_file: Callable[[str], str] = str


@dataclass(frozen=True)
class Family:
    """One kind of models: what its checkpoints are known by, and how a model is made of one.

    The caller of `generator` and `tokenizer` checks that no weight is missing, left over, of the wrong shape or not
    finite. Either is None for a family that has no such model.
    """

    name: str
    """As varpi's own files call it; the first word of its architectures' names."""
    architectures: tuple[str, ...]
    """Names of released models, each beginning with the family's name and a dash."""
    generator: Callable[[Pretrained], Assembled] | None = None
    tokenizer: Callable[[Pretrained], Assembled] | None = None
    model_types: tuple[str, ...] = ()
    """The values of "model_type" in config.json that it reads."""
    known_by: tuple[str, ...] = ()
    """Names of tensors: a checkpoint that says nothing of itself is the family's if it has one of these."""
    config: type | None = None
    """The dataclass of its shape; None: a shape cannot be given by fields."""
    build: Callable[[Any], Stored] | None = None
    """A fresh model of such a shape."""
    shapes: Mapping[str, Callable[[str, int | None], Stored]] = field(default_factory=dict)
    """"generator", "tokenizer": that model of an architecture's name and an image size, on the meta device."""
