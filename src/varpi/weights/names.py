"""What foreign checkpoints call things: the name table, the named architectures, and what tensors tell of a model.

Original names are those of LlamaGen's released files. The VQ tokenizer's module names are the original ones already, so
it needs no table. Nothing here reads a file.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor

from varpi.errors import VarpiError
from varpi.generators.llamagen import SIZES, LlamaGenConfig
from varpi.generators.pretrained import families
from varpi.tokenizers.vq import VQConfig

GENERATOR_NAMES: dict[str, str] = {  # original -> ours; {i} is the layer
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
GENERATOR_TABLES = {  # recomputed or scratch: old files hold them, nothing loads them
    "freqs_cis",
    "causal_mask",
    "layers.{i}.attention.kv_cache.k_cache",
    "layers.{i}.attention.kv_cache.v_cache",
}
_OURS_TO_ORIGINAL = {ours: original for original, ours in GENERATOR_NAMES.items()}


def architectures(kind: Literal["generator", "tokenizer"]) -> tuple[str, ...]:
    """The names that an architecture can be given by."""
    if kind == "tokenizer":
        return "vq-16", "vq-8"
    llamagen = (f"llamagen-{conditioning}-{size}" for conditioning in ("c2i", "t2i") for size in SIZES)
    return (*llamagen, *(name for family in families().values() for name in family.ARCHITECTURES))


def _split(name: str) -> tuple[str, str]:
    """("layers.{i}.ffn_norm.weight", "12") of "layers.12.ffn_norm.weight"; the index is empty where there is none."""
    match = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name[: match.start()] + "{i}" + name[match.end() :], match[0]) if match else (name, "")


def original_name(ours: str) -> str:
    """LlamaGen's name of our generator's tensor `ours`; a name of neither is returned as it is."""
    pattern, index = _split(ours)
    return _OURS_TO_ORIGINAL.get(pattern, pattern).replace("{i}", index)


def is_table(original: str) -> bool:
    """Whether a generator checkpoint's entry holds no weights and is left behind."""
    return _split(original)[0] in GENERATOR_TABLES


def generator_config(name: str, grid: int) -> LlamaGenConfig:
    """The configuration of a named generator, for example "llamagen-c2i-xxl"."""
    match = re.fullmatch(r"llamagen-(c2i|t2i)-(\w+)", name.lower())
    if not match or match[2] not in SIZES:
        raise VarpiError(unknown(name, "generator", architectures("generator")))
    return LlamaGenConfig.named(match[2], grid=grid, conditioning="class" if match[1] == "c2i" else "text")


def tokenizer_config(name: str) -> VQConfig:
    """The configuration of a named tokenizer: "vq-16" or "vq-8"."""
    if name.lower() not in ("vq-16", "vq-8"):
        raise VarpiError(unknown(name, "tokenizer", architectures("tokenizer")))
    return VQConfig(downsample=int(name.split("-")[1]))


def unknown(name: str, kind: str, known: Iterable[str]) -> str:
    """What to say of an architecture that is not among the known ones."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"no {kind} architecture is called {name!r}; {hint}"


def generator_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
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


def tokenizer_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a `VQConfig` that the tensors reveal, as far as they are there."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    facts: dict[str, Any] = {}
    if len(codes := shape.get("quantize.embedding.weight", ())) == 2:
        facts["codebook_size"], facts["codebook_dim"] = codes
    if len(conv := shape.get("quant_conv.weight", ())) == 4:
        facts["latent_channels"] = conv[1]
    if (conv_in := shape.get("encoder.conv_in.weight")) is not None and len(conv_in) == 4:
        facts["channels"] = conv_in[0]
        levels = [shape.get(f"encoder.conv_blocks.{level}.res.0.conv1.weight") for level in range(_count(shape))]
        if levels and all(level and level[0] % conv_in[0] == 0 for level in levels):
            facts["channel_multipliers"] = tuple(level[0] // conv_in[0] for level in levels if level)
            facts["downsample"] = 2 ** (len(levels) - 1)
    for side in ("encoder", "decoder"):
        blocks = [name for name in shape if re.fullmatch(rf"{side}\.conv_blocks\.0\.res\.\d+\.conv1\.weight", name)]
        if blocks:
            facts[f"{side}_blocks"] = len(blocks)
    return facts


def _count(shape: Mapping[str, tuple[int, ...]]) -> int:
    """How many resolution levels the encoder has."""
    levels = [int(match[1]) for name in shape if (match := re.match(r"encoder\.conv_blocks\.(\d+)\.", name))]
    return max(levels, default=-1) + 1


def infer_generator(where: str, facts: Mapping[str, Any], grid: int) -> LlamaGenConfig:
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


def infer_tokenizer(where: str, facts: Mapping[str, Any]) -> VQConfig:
    """The configuration that the facts imply."""
    needed = ("codebook_size", "latent_channels", "channels", "downsample", "encoder_blocks", "decoder_blocks")
    absent = [field for field in needed if field not in facts]
    if absent:
        raise VarpiError(f"{where}: its tensors do not tell {', '.join(absent)}; name the architecture (vq-16, vq-8)")
    return VQConfig(**facts)
