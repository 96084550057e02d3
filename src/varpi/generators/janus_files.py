"""Janus-Pro's released files: what deepseek's and transformers' layouts call things, and what describes the model.

Everything is brought to transformers' names and its `JanusConfig`. deepseek's config.json tells little, for its code
fills in the rest: there the shapes of the tensors speak.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from varpi.errors import VarpiError
from varpi.generators.language_model import transformers
from varpi.runtime.files import read_json
from varpi.tokenizers.vq import VQConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TextTokenizer
    from transformers import JanusConfig

SIZES = {"janus-pro-1b": (2048, 5632, 24), "janus-pro-7b": (4096, 11008, 30)}  # width, feed-forward width, layers
VOCABULARY, CONTEXT, HEAD_WIDTH = 102400, 16384, 128
VISION_HEADS = 16  # of SigLIP-L, the only one deepseek's code knows at this patch size
SPECIAL = {  # the strings are the same in every size, the ids are not; under the names of generation_config.json
    "bos_token_id": "<｜begin▁of▁sentence｜>",
    "pad_token_id": "<｜▁pad▁｜>",
    "boi_token_id": "<begin_of_image>",
    "image_token_id": "<image_placeholder>",
}

# deepseek's names -> transformers': how a name begins, and what changes in the rest of it.
PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "gen_embed.": "model.generation_embeddings.",
    "gen_aligner.layers.0.": "model.generation_aligner.fc1.",
    "gen_aligner.layers.2.": "model.generation_aligner.hidden_layers.0.",
    "gen_head.output_mlp_projector.": "model.generation_head.proj_out.",
    "gen_head.vision_head.": "model.generation_head.vision_head.",
    "aligner.layers.0.": "model.aligner.fc1.",
    "aligner.layers.2.": "model.aligner.hidden_layers.0.",
    "vision_model.vision_tower.patch_embed.proj.": "model.vision_model.embeddings.patch_embedding.",
    "vision_model.vision_tower.pos_embed": "model.vision_model.embeddings.position_embedding.weight",
    "vision_model.vision_tower.blocks.": "model.vision_model.encoder.layers.",
    "vision_model.vision_tower.norm.": "model.vision_model.post_layernorm.",
    "gen_vision_model.": "model.vqmodel.",
}
VISION_PARTS = {
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv_proj.",
    ".attn.proj.": ".self_attn.projection_layer.",
}
VQ_PARTS = {
    "encoder.conv_blocks.": "encoder.down.",
    "decoder.conv_blocks.": "decoder.up.",
    ".res.": ".block.",
    ".mid.0.": ".mid.block_1.",
    ".mid.1.": ".mid.attn_1.",
    ".mid.2.": ".mid.block_2.",
}
# No part of the model: SigLIP's pooling, a statistic of the tokenizer's training, and tables that old files hold.
UNUSED = re.compile(r"vision_model\.vision_tower\.attn_pool\..*|.*\.quantize\.codebook_used|.*\.rotary_emb\.inv_freq")


# -- names


def transformers_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of either layout under transformers' names, the unused ones left out; unknown names stay as they are."""
    renamed = {}
    for name, tensor in tensors.items():
        theirs = transformers_name(name)
        if UNUSED.fullmatch(name):
            continue
        if theirs.endswith((".qkv_proj.weight", ".qkv_proj.bias")) and tensor.ndim and len(tensor) % 3 == 0:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[theirs.replace(".qkv_proj.", f".{letter}_proj.")] = part
        else:  # deepseek's position embedding has a batch axis
            renamed[theirs] = tensor[0] if name.endswith(".pos_embed") and tensor.ndim == 3 else tensor
    return renamed


def transformers_name(name: str) -> str:
    """Transformers' name of a tensor of deepseek's files; `.qkv_proj.` stands for the three that one is split into."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        return name
    parts = {"vision_model.vision_tower.blocks.": VISION_PARTS, "gen_vision_model.": VQ_PARTS}.get(prefix, {})
    return PREFIXES[prefix] + _replace(name.removeprefix(prefix), parts)


def vq_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image tokenizer's tensors in files of either layout, under the names of `varpi.tokenizers.VQ`."""
    original = {new: old for old, new in VQ_PARTS.items()}
    ours = {}
    for name, tensor in tensors.items():
        if name.startswith("gen_vision_model."):
            ours[name.removeprefix("gen_vision_model.")] = tensor
        elif name.startswith("model.vqmodel."):
            ours[_replace(name.removeprefix("model.vqmodel."), original)] = tensor
    return ours


def _replace(name: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


# -- shapes


def config_for(architecture: str) -> "JanusConfig":
    """The configuration of a released size, "janus-pro-1b" or "janus-pro-7b".

    Raises VarpiError for another name, or without transformers.
    """
    if architecture.lower() not in SIZES:
        raise VarpiError(f"no Janus architecture is called {architecture!r}; known are {', '.join(SIZES)}")
    width, hidden, layers = SIZES[architecture.lower()]
    return _config({"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers})


def config_from(where: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "JanusConfig":
    """The configuration in a config.json of either layout; `tensors` are the checkpoint's under transformers' names.

    Raises VarpiError if it does not describe a Janus model, or tensors that are to complete it are missing.
    """
    try:
        plain = _without_dtype(config)
        original = config.get("model_type") == "multi_modality"
        made: Any = _completed(where, plain, tensors) if original else transformers().JanusConfig.from_dict(plain)
        tokens, side = (
            made.vision_config.num_image_tokens,
            made.vision_config.image_size // made.vision_config.patch_size,
        )
    except VarpiError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        message = " ".join(str(error).split())
        raise VarpiError(f"{where}: config.json does not describe a Janus model: {message:.200}") from error
    if tokens != side**2:
        raise VarpiError(f"{where}: config.json says {tokens} image tokens, but a grid of {side}x{side}")
    return made


def _without_dtype(config: Mapping[str, Any]) -> dict[str, Any]:
    """The weights have a dtype of their own, which may be another once they are saved again."""
    return {
        key: _without_dtype(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ("dtype", "torch_dtype")
    }


def _config(
    text: Mapping[str, Any], vision: Mapping[str, Any] | None = None, vq: VQConfig | None = None
) -> "JanusConfig":
    """A `JanusConfig` from what differs from Janus-Pro's common shape. Its output layer is never tied."""
    vq, width = vq or VQConfig(), text["hidden_size"]
    common = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "num_attention_heads": width // HEAD_WIDTH,
    }
    tokenizer = {
        "base_channels": vq.channels,
        "channel_multiplier": list(vq.multipliers),
        "num_res_blocks": vq.encoder_blocks,
        "latent_channels": vq.latent_channels,
        "num_embeddings": vq.codebook_size,
        "embed_dim": vq.codebook_dim,
        "projection_dim": width,
        "image_token_embed_dim": width,
    }
    return transformers().JanusConfig(
        text_config={**common, **text},
        vision_config={**(vision or {}), "projection_dim": width},
        vq_config=tokenizer,
        tie_word_embeddings=False,
    )


def _completed(where: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "JanusConfig":
    """deepseek's config.json, with the shapes of the tensors before the defaults of its code."""

    def shape(name: str, dims: int = 2) -> tuple[int, ...]:
        return _shape(where, tensors, f"model.{name}.weight", dims)

    said = config.get("language_config", {})
    vocabulary, width = shape("language_model.embed_tokens")
    heads = said.get("num_attention_heads", width // HEAD_WIDTH)
    head_width = said.get("head_dim", width // heads)
    text = {
        **said,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape("language_model.layers.0.mlp.gate_proj")[0],
        "num_hidden_layers": _count(tensors, r"model\.language_model\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "num_key_value_heads": shape("language_model.layers.0.self_attn.k_proj")[0] // head_width,
    }
    patches, vision_width = shape("vision_model.embeddings.position_embedding")
    patch_size = shape("vision_model.embeddings.patch_embedding", 4)[-1]
    vision = {
        "hidden_size": vision_width,
        "num_hidden_layers": _count(tensors, r"model\.vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": VISION_HEADS,
        "mlp_ratio": shape("vision_model.encoder.layers.0.mlp.fc1")[0] / vision_width,
        "patch_size": patch_size,
        "image_size": math.isqrt(patches) * patch_size,
        "num_image_tokens": patches,
    }
    return _config(text, vision, vq_config(where, vq_tensors(tensors)))


def vq_config(where: str, tensors: Mapping[str, Tensor]) -> VQConfig:
    """The shape of the image tokenizer whose tensors these are, by the names of `varpi.tokenizers.VQ`.

    Raises VarpiError if tensors that tell it are missing.
    """
    levels = _count(tensors, r"encoder\.conv_blocks\.(\d+)\.")
    channels = _shape(where, tensors, "encoder.conv_in.weight", 4)[0]
    widths = [_shape(where, tensors, f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in range(levels)]
    size, dim = _shape(where, tensors, "quantize.embedding.weight", 2)
    return VQConfig(
        downsample=2 ** (levels - 1),
        channels=channels,
        codebook_size=size,
        codebook_dim=dim,
        channel_multipliers=tuple(width // channels for width in widths),
        latent_channels=_shape(where, tensors, "quant_conv.weight", 4)[1],
        encoder_blocks=_count(tensors, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
        decoder_blocks=_count(tensors, r"decoder\.conv_blocks\.0\.res\.(\d+)\."),
    )


def _shape(where: str, tensors: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors:
        raise VarpiError(f"{where}: is not a whole Janus checkpoint: {name} is missing")
    if tensors[name].ndim != dims:
        raise VarpiError(f"{where}: {name} has shape {tuple(tensors[name].shape)}; it must have {dims} dimensions")
    return tuple(tensors[name].shape)


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return max((int(match[1]) + 1 for name in tensors if (match := re.match(pattern, name))), default=0)


# -- text


def special_ids(folder: Path | None, config: Mapping[str, Any], tokenizer: "TextTokenizer | None") -> dict[str, int]:
    """The ids of the `SPECIAL` tokens, as far as they are known: from the tokenizer, else from the JSON files."""
    stored: dict[str, Any] = {}
    if folder is not None and (folder / "generation_config.json").is_file():
        stored = read_json(folder / "generation_config.json")
        if not isinstance(stored, dict):
            raise VarpiError(f"{folder / 'generation_config.json'}: is a {type(stored).__name__}, not a mapping")
    known = {**config, **stored, **(stored.get("generation_kwargs") or {})}
    if tokenizer is not None:
        found = {name: tokenizer.token_to_id(text) for name, text in SPECIAL.items()}
        known |= {name: number for name, number in found.items() if number is not None}
    return {name: known[name] for name in SPECIAL if isinstance(known.get(name), int)}
