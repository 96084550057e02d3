"""LlamaGen's released files: what they call things, the released sizes, and what tensors tell of a model.

Original names are those of the released files; ours are those of `LlamaGen`'s state dict.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from varpi.errors import VarpiError
from varpi.runtime.pretrained import Pretrained, whole_number

SIZES: dict[str, tuple[int, int, int]] = {  # layers, width, heads (LlamaGen, Table 1 and model file)
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (36, 1280, 20),
    "xxl": (48, 1536, 24),
    "xxxl": (48, 2560, 40),
    "1b": (22, 2048, 32),
    "3b": (24, 3200, 32),
    "7b": (32, 4096, 32),
}
ARCHITECTURES = tuple(f"llamagen-{conditioning}-{size}" for conditioning in ("c2i", "t2i") for size in SIZES)


@dataclass(frozen=True)
class LlamaGenConfig:
    """The shape of a LlamaGen GPT. `grid` is tokens per side: image size / tokenizer down-sampling."""

    dim: int
    n_layer: int
    n_head: int
    vocab_size: int = 16384
    grid: int = 16
    conditioning: Literal["class", "text"] = "class"
    num_classes: int = 1000
    condition_tokens: int | None = None
    """1 for a class, 120 for a caption, unless given."""
    caption_dim: int = 2048
    """Width of the caption features (flan-t5-xl: 2048); text only."""
    ffn_dim: int | None = None
    """SwiGLU hidden width; by default 8/3 of `dim`, rounded up to a multiple of 256."""
    dropout: float = 0.1
    """After the embeddings, the attention output and the feed-forward output, in train mode."""
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.conditioning not in ("class", "text"):
            raise VarpiError(f"LlamaGenConfig: conditioning is {self.conditioning!r}; it must be 'class' or 'text'")
        if self.condition_tokens is None:
            object.__setattr__(self, "condition_tokens", 1 if self.conditioning == "class" else 120)
        assert self.condition_tokens is not None
        counts = ("dim", "n_layer", "n_head", "vocab_size", "grid", "num_classes", "condition_tokens", "caption_dim")
        for name in counts:
            whole_number("LlamaGenConfig", name, getattr(self, name), 1024 if name in ("n_layer", "grid") else 2**24)
        if self.ffn_dim is None:
            object.__setattr__(self, "ffn_dim", -(-int(8 * self.dim / 3) // 256) * 256)
        whole_number("LlamaGenConfig", "ffn_dim", self.ffn_dim, 2**26)
        if self.dim % self.n_head or (self.dim // self.n_head) % 4:
            raise VarpiError(
                f"LlamaGenConfig: dim {self.dim} over {self.n_head} heads must give a head width divisible by 4"
            )
        if (self.grid**2 + self.condition_tokens) * (self.dim // self.n_head) > 2**28:
            raise VarpiError(
                f"LlamaGenConfig: a grid of {self.grid}, {self.condition_tokens} condition_tokens and heads of width "
                f"{self.dim // self.n_head} make a rotary table of more than 1 GiB"
            )
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise VarpiError(f"LlamaGenConfig: dropout is {self.dropout!r}; it must be a number in [0, 1)")
        for name in ("rope_base", "norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise VarpiError(f"LlamaGenConfig: {name} is {value!r}; it must be a number above 0")

    @classmethod
    def named(cls, size: str, **overrides: Any) -> "LlamaGenConfig":
        """The configuration of a released size: one of `SIZES`, with any other field given by name."""
        if size.lower() not in SIZES:
            raise VarpiError(f"no LlamaGen size {size!r}; the sizes are {', '.join(SIZES)}")
        n_layer, dim, n_head = SIZES[size.lower()]
        return cls(dim=dim, n_layer=n_layer, n_head=n_head, **overrides)


# -- names

NAMES: dict[str, str] = {  # original -> ours; {i} is the layer
    "cls_embedding.embedding_table.weight": "class_embedding.weight",
    "cls_embedding.uncond_embedding": "caption_embedding.null",
    "cls_embedding.cap_proj.fc1.weight": "caption_embedding.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "caption_embedding.fc2.weight",
    "tok_embeddings.weight": "token_embedding.weight",
    "layers.{i}.attention.wqkv.weight": "blocks.{i}.attention.qkv.weight",
    "layers.{i}.attention.wo.weight": "blocks.{i}.attention.out.weight",
    "layers.{i}.feed_forward.w1.weight": "blocks.{i}.feed_forward.gate.weight",
    "layers.{i}.feed_forward.w3.weight": "blocks.{i}.feed_forward.up.weight",
    "layers.{i}.feed_forward.w2.weight": "blocks.{i}.feed_forward.down.weight",
    "layers.{i}.attention_norm.weight": "blocks.{i}.attention_norm.weight",
    "layers.{i}.ffn_norm.weight": "blocks.{i}.ffn_norm.weight",
    "norm.weight": "norm.weight",
    "output.weight": "output.weight",
}
TABLES = {  # recomputed or scratch: old files hold them, nothing loads them
    "freqs_cis",
    "causal_mask",
    "layers.{i}.attention.kv_cache.k_cache",
    "layers.{i}.attention.kv_cache.v_cache",
}
_ORIGINAL = {ours: original for original, ours in NAMES.items()}


def _split(name: str) -> tuple[str, str]:
    """("layers.{i}.ffn_norm.weight", "12") of "layers.12.ffn_norm.weight"; the index is empty where there is none."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name[: match.start()] + "{i}" + name[match.end() :], match[0]) if match else (name, "")


def original_name(ours: str) -> str:
    """LlamaGen's name of our generator's tensor `ours`; a name of neither is returned as it is."""
    pattern, index = _split(ours)
    return _ORIGINAL.get(pattern, pattern).replace("{i}", index)


def is_table(original: str) -> bool:
    """Whether a generator checkpoint's entry holds no weights and is left behind."""
    return _split(original)[0] in TABLES


# -- shapes


def config_for(architecture: str, grid: int = 16) -> LlamaGenConfig:
    """The configuration of a released model, one of `ARCHITECTURES`. Raises VarpiError for another name."""
    if architecture.lower() not in ARCHITECTURES:
        raise VarpiError(f"no LlamaGen is called {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    _, conditioning, size = architecture.lower().split("-")
    return LlamaGenConfig.named(size, grid=grid, conditioning="class" if conditioning == "c2i" else "text")


def config_from(source: Pretrained, tensors: Mapping[str, Tensor]) -> tuple[LlamaGenConfig, str]:
    """The configuration of a checkpoint, with tensors under original names, and what to call where it is from."""
    facts = facts_of(tensors)
    return source.resolve(
        LlamaGenConfig,
        facts,
        named=lambda name: config_for(name, _grid(source)),
        implied=lambda: _implied(source.where, facts, _grid(source)),
        unseen=("n_head", "grid", "rope_base", "norm_eps"),
    )


def _grid(source: Pretrained) -> int:
    """Tokens per side: the file's own word, or that of an image size with a 16-fold tokenizer."""
    size = source.image_size
    if source.config:
        return source.config.get("grid", LlamaGenConfig.grid)
    if size is None:
        raise VarpiError(f"{source.where}: does not tell for which image size it is; pass image_size (256, 384, …)")
    if size < 16 or size % 16:
        raise VarpiError(f"{source.where}: image_size is {size}; it must be a multiple of 16, the tokenizer's patch")
    return size // 16


def facts_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a `LlamaGenConfig` that tensors under their original names reveal, as far as they are there."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    facts: dict[str, Any] = {}
    if len(table := shape.get("tok_embeddings.weight", ())) == 2:
        facts["vocab_size"], facts["dim"] = table
    if layers := [int(match[1]) for name in shape if (match := re.match(r"layers\.(\d+)\.", name))]:
        facts["n_layer"] = max(layers) + 1
    if len(gate := shape.get("layers.0.feed_forward.w1.weight", ())) == 2:
        facts["ffn_dim"] = gate[0]
    if len(classes := shape.get("cls_embedding.embedding_table.weight", ())) == 2:
        facts |= {"conditioning": "class", "num_classes": classes[0] - 1}
    elif len(null := shape.get("cls_embedding.uncond_embedding", ())) == 2:
        facts |= {"conditioning": "text", "condition_tokens": null[0], "caption_dim": null[1]}
    return facts


def _implied(where: str, facts: Mapping[str, Any], grid: int) -> LlamaGenConfig:
    """The configuration that the facts imply. The number of heads leaves no trace in tensors: only `SIZES` tell it."""
    heads = {(n_layer, dim): n_head for n_layer, dim, n_head in SIZES.values()}
    size = (facts.get("n_layer", 0), facts.get("dim", 0))
    if "conditioning" not in facts:
        raise VarpiError(f"{where}: has neither a class table nor a caption embedding (cls_embedding.*)")
    if size not in heads:
        raise VarpiError(
            f"{where}: no named LlamaGen has {size[0]} layers of width {size[1]}, and tensors do not tell the number "
            "of heads; pass architecture=LlamaGenConfig(...)"
        )
    return LlamaGenConfig(n_head=heads[size], grid=grid, **facts)
