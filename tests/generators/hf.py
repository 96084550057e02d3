"""Tiny random models of transformers' own classes, saved as their releases are, and read back as varpi does it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration, PreTrainedTokenizerFast

from varpi.runtime.pretrained import Pretrained

WORDS = ("[UNK]", "a", "the", "red", "blue", "cat", "dog", "moon", "on", "under", "small", "sleeping", ":", ".", "\n\n")
BOS, EOS, PAD, BOI, IMAGE = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<begin_of_image>",
    "<image_placeholder>",
)
SPECIAL = [BOS, EOS, PAD, BOI, "<end_of_image>", IMAGE, "<|User|>", "<|Assistant|>"]
IDS = {word: i for i, word in enumerate([*WORDS, *SPECIAL])}
IMAGE_TOKENS = 16


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Splits into words, line breaks and Janus-Pro's special tokens; begins a text with BOS, pads on the left."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    parts = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"\n+|\w+|[^\w\s]+"), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left"
    )


def janus_config(**changes: Any) -> JanusConfig:
    """4x4 tokens of 4 pixels; `changes` of the top level."""
    settings: dict[str, Any] = {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 48,
        },
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 16,
            "mlp_ratio": 2.0,
            "image_size": 16,
            "patch_size": 4,
            "num_image_tokens": IMAGE_TOKENS,
            "projection_dim": 32,
        },
        "vq_config": {
            "base_channels": 32,
            "channel_multiplier": [1, 1, 2],
            "num_res_blocks": 1,
            "latent_channels": 8,
            "num_embeddings": 64,
            "embed_dim": 4,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        "image_token_id": IDS[IMAGE],
        "tie_word_embeddings": False,
    }
    return JanusConfig(**{**settings, **changes})


def janus(seed: int = 1, **changes: Any) -> Any:
    """Random, with weights so large that every token depends on the prompt and on those before it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(janus_config(**changes))
        for name, parameter in model.named_parameters():
            if "vqmodel" in name or parameter.ndim < 2:
                nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.1)
            else:
                nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
        nn.init.normal_(model.model.generation_embeddings.weight)
        nn.init.normal_(model.model.language_model.embed_tokens.weight)
        nn.init.normal_(model.model.vqmodel.quantize.embedding.weight, std=3.0)
    model.generation_config = GenerationConfig(
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
        pad_token_id=IDS[PAD],
        generation_kwargs={"boi_token_id": IDS[BOI]},
    )
    return model.eval()


def save(model: Any, folder: Path) -> Path:
    """The weights, config.json, generation_config.json and the text tokenizer's files."""
    model.save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return folder


def source(folder: Path, **compat: bool) -> Pretrained:
    """What is read from such a folder."""
    return Pretrained(
        where=str(folder),
        tensors=load_file(folder / "model.safetensors"),
        config=json.loads((folder / "config.json").read_text()),
        folder=folder,
        compat=compat,
    )


def load(family: Any, pretrained: Pretrained) -> Any:
    """The generator that a family's module makes of a checkpoint, with its weights."""
    return fill(*family.assemble(pretrained)[:2])


def fill(module: Any, weights: dict[str, Tensor]) -> Any:
    """A module on the meta device with copies of the weights, strictly, in eval mode."""
    module.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, strict=True, assign=True)
    if hasattr(module, "reset_tables"):
        module.reset_tables()
    return module.eval()
