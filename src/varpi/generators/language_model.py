"""What generators on a language model of transformers share: prompts, a cache, masks, checkpointing, text tokenizers.

Shapes: B images, P prompt tokens, S positions, H heads of width E.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varpi.data.dataset import CAPTION_TOO_LONG, Dropped
from varpi.errors import VarpiError
from varpi.runtime.pretrained import Pretrained

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TextTokenizer


def transformers() -> ModuleType:
    """The module transformers; raises VarpiError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise VarpiError("this generator needs transformers: pip install 'varpi[text]'") from error
    return transformers


def described(source: Pretrained, config_for: Callable[[str], Any]) -> dict[str, Any]:
    """What config.json holds: the checkpoint's own, or for one without it that of the named architecture.

    Raises VarpiError where both are given and are not of the same size.
    """
    if source.architecture is None:
        return source.config
    if source.config:
        if isinstance(source.architecture, str):
            _check_sizes(source, config_for(source.architecture.lower()).to_dict())
        return source.config
    if not isinstance(source.architecture, str):
        raise VarpiError(
            f"{source.where}: this family's models are described by config.json; put it beside the weights"
        )
    return config_for(source.architecture.lower()).to_dict()


def _check_sizes(source: Pretrained, named: dict[str, Any]) -> None:
    own = source.config.get("text_config")
    for name in ("hidden_size", "num_hidden_layers"):
        said, expected = own.get(name) if isinstance(own, dict) else None, named["text_config"][name]
        if said not in (None, expected):
            raise VarpiError(
                f"{source.where}: config.json says {name} {said!r:.40}, but a {source.architecture} has {expected}; "
                "leave out the architecture"
            )


@contextmanager
def on_meta(source: Pretrained, *parts: Any) -> Iterator[None]:
    """Make a model on the meta device from a config.json, refusing what no checkpoint of so many tensors can be.

    parts: the configurations whose repeated modules are counted before any is made.
    """
    for part in parts:
        for name in ("num_hidden_layers", "num_res_blocks"):
            count = getattr(part, name, 0)
            if type(count) is not int or not 0 <= count <= len(source.tensors):
                raise VarpiError(
                    f"{source.where}: config.json says {name} {count!r:.40}, its tensors are {len(source.tensors)}"
                )
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, OverflowError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        if isinstance(error, VarpiError):
            raise
        message = " ".join(str(error).split())
        raise VarpiError(f"{source.where}: no model is as config.json describes it: {message:.200}") from error


# -- prompts


@dataclass(frozen=True)
class PromptCondition:
    """Prompts, left-padded.

    ids: int64 (B,P). mask: bool (B,P), true where valid. pad_id: what stands in `ids` where nothing is valid.
    """

    ids: Tensor
    mask: Tensor
    pad_id: int

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], pad_id: int) -> "PromptCondition":
        """From lists of token ids, none of them empty."""
        width = max(map(len, rows))
        ids = torch.tensor([[pad_id] * (width - len(row)) + [*row] for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows])
        return cls(ids, torch.arange(width) >= width - lengths[:, None], pad_id)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> "PromptCondition":
        return replace(self, ids=self.ids[index], mask=self.mask[index])

    def to(self, device: torch.device | str) -> "PromptCondition":
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))

    def concat(self, other: "PromptCondition") -> "PromptCondition":
        """`self` followed by `other`; the shorter side is padded on the left."""
        width = max(self.ids.shape[1], other.ids.shape[1])
        ids = [F.pad(side.ids, (width - side.ids.shape[1], 0), value=self.pad_id) for side in (self, other)]
        mask = [F.pad(side.mask, (width - side.mask.shape[1], 0), value=False) for side in (self, other)]
        return replace(self, ids=torch.cat(ids), mask=torch.cat(mask))

    def refuse_longer_than(self, room: int, image: int) -> None:
        """Raise VarpiError for a prompt of more than `room` tokens, what a context leaves beside those of an image."""
        for i, length in enumerate(self.mask.sum(dim=1).tolist()):
            if length > room:
                raise VarpiError(
                    f"prompt {i} has {length} tokens; beside the {image} of an image {room} fit into this model's "
                    "context: shorten it"
                )


@dataclass(frozen=True)
class CaptionRoom:
    """Refuses captions that are too long, as the `caption_check` of a generator that tokenizes them itself."""

    tokenizer: "TextTokenizer"
    dialogue: Callable[[str], str]
    """The text that a caption becomes."""
    around: int
    """Tokens that a prompt has beside those of that text."""
    room: int
    """Tokens that a prompt may have."""

    def __call__(self, caption: str, name: str) -> None:
        length = len(self.tokenizer.encode(self.dialogue(caption), add_special_tokens=False).ids) + self.around
        if length > self.room:
            message = f"{name}: the caption {caption[:40]!r}… makes {length} tokens; {self.room} fit into the context"
            raise Dropped(message, CAPTION_TOO_LONG)


def text_tokenizer(folder: Path | None) -> "TextTokenizer | None":
    """The tokenizer that `folder`/tokenizer.json describes; None where there is no such file.

    Read by itself: the class that deepseek's tokenizer_config.json names would split words by Llama's rules.
    Raises VarpiError if the file cannot be read.
    """
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    transformers()  # which brings the package tokenizers along
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the package raises nothing narrower
        raise VarpiError(f"{folder / 'tokenizer.json'}: is not a text tokenizer: {error!s:.200}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


# -- the transformer


class Cache:
    """Keys and values (B,H,S,E) of every layer, written in place, and `visible` bool (B,1,1,S), true where not padding.

    Made anew by each prefill, which first knows the length of the prompts. It stands where transformers' layers expect
    a cache of theirs. static: decoding attends to all of it, under a mask; otherwise to what is written alone.
    """

    def __init__(self, batch_size: int, *, static: bool = False) -> None:
        self.batch_size = batch_size
        self.static = static
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.visible = torch.empty(0)
        self.length = 0
        self.at: Tensor | None = None

    def reset(self, shape: tuple[int, ...], layers: int, like: Tensor, visible: Tensor) -> None:
        """Room for keys of this shape, in the dtype and on the device of `like`."""
        if len(visible) != self.batch_size:
            raise VarpiError(f"{len(visible)} prompts, but the cache is for {self.batch_size}")
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.visible, self.length, self.at = visible, 0, None

    def first(self, count: int) -> "Cache":
        """That of the first `count` sequences, in the same memory."""
        part = Cache(count, static=self.static)
        part.keys, part.values = [keys[:count] for keys in self.keys], [values[:count] for values in self.values]
        part.visible, part.length, part.at = self.visible[:count], self.length, self.at
        return part

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Put a layer's new keys and values at `length` and give all up to them; or, static, at `at` and give all."""
        if self.at is not None:
            return self.keys[layer].index_copy_(2, self.at, keys), self.values[layer].index_copy_(2, self.at, values)
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def attention_mask(valid: Tensor, start: int = 0) -> Tensor:
    """Bool (B,1,S-start,S) from valid bool (B,S): causal, padding hidden, but every position sees itself."""
    keys = torch.arange(valid.shape[1], device=valid.device)
    queries = keys[start:, None]
    return ((keys <= queries) & valid[:, None] | (keys == queries))[:, None]


@contextmanager
def checkpointed(layers: nn.ModuleList, enabled: bool) -> Iterator[None]:
    """Recompute these layers' activations in the backward pass, in train and eval mode alike.

    Transformers does so in train mode only: claim that mode for the layers, not for their parts.
    """
    chosen: list[Any] = list(layers) if enabled and torch.is_grad_enabled() else []
    modes = [layer.training for layer in chosen]
    for layer in chosen:
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = layer.training = True
    try:
        yield
    finally:
        for layer, mode in zip(chosen, modes, strict=True):
            layer.gradient_checkpointing, layer.training = False, mode
