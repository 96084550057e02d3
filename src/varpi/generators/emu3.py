"""Emu3 (arXiv 2409.18869): a language model whose vocabulary holds image codes too, on transformers' implementation.

Shapes: B images, g rows of g codes, N = g * g codes per image (row-major), V codes, P prompt tokens,
S = P + g (g + 1) - 2 positions.

The sequence is: beginning of sequence, caption, beginning of image, the text "g*g", image marker, rows of codes. What
stands between two rows is fed, never predicted: outside this file an image is its N codes alone.

One line of config.json is varpi's own: "varpi_grid" is g, by default 90, the 720 pixels that Emu3-Gen was released for.
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.generators.generator import Generator
from varpi.generators.language_model import (
    Cache,
    CaptionRoom,
    PromptCondition,
    attention_mask,
    checkpointed,
    described,
    on_meta,
    text_tokenizer,
    transformers,
)
from varpi.runtime.pretrained import Assembled, Family, Pretrained
from varpi.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TextTokenizer
    from transformers import Emu3Config, Emu3VQVAEConfig

__all__ = ["FAMILY", "Emu3", "Emu3Tokenizer", "PromptCondition", "assemble", "assemble_tokenizer"]

GRID = 90
CODE = "<|visual token {:06d}|>"
BEGIN_IMAGE, IMAGE, END_LINE = "<|image start|>", "<|image token|>", "<|extra_200|>"

# How names begin in files -> in the generator; transformers writes the first three and reads all five.
PREFIXES = {
    "text_model.model.": "hf.model.text_model.",
    "text_model.lm_head.": "hf.lm_head.",
    "vqmodel.": "hf.model.vqmodel.",
    "model.": "hf.model.",
    "lm_head.": "hf.lm_head.",
}


class Emu3(Generator):
    """The generator. `logits` means the same in train and eval mode, dropout aside; it never drops the condition.

    config: of the transformers model, which becomes `hf`, with the grid as `varpi_grid`.
    folder: where the files of the text tokenizer lie. tokenizer: that text tokenizer; without one captions are refused.
    """

    family: ClassVar[str] = "emu3"
    code_ids: Tensor

    def __init__(
        self, config: "Emu3Config", *, folder: Path | None = None, tokenizer: "TextTokenizer | None" = None
    ) -> None:
        super().__init__()
        settings: Any = config
        settings._attn_implementation = "sdpa"  # the one that takes the masks made here
        self.hf: Any = transformers().Emu3ForConditionalGeneration(config)
        self.hf.model.vqmodel.requires_grad_(False)
        self.folder = folder
        self.text_tokenizer = tokenizer
        architecture = {"architectures": ["Emu3ForConditionalGeneration"]}
        self.hf_config = {**architecture, **json.loads(config.to_json_string())}
        self.grid: int = settings.varpi_grid
        self.num_tokens = self.grid**2
        self.inputs = self.grid * (self.grid + 1) - 2  # ends of lines too; neither the last of them nor the last code
        self.vocab_size: int = settings.vq_config.codebook_size
        self.num_classes = None
        self.tied = config.tie_word_embeddings
        self.vocabulary: dict[str, int] = settings.vocabulary_map
        self.bos_id: int = settings.text_config.bos_token_id
        self.pad_id: int = settings.text_config.pad_token_id
        self.context: int = settings.text_config.max_position_embeddings
        self.register_buffer("code_ids", self._code_ids(), persistent=False)

    def _code_ids(self) -> Tensor:
        return torch.tensor([self.vocabulary[CODE.format(code)] for code in range(self.vocab_size)])

    @property
    def blocks(self) -> nn.ModuleList:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.hf.model.text_model.layers

    def reset_tables(self) -> None:
        """Make what no checkpoint holds again: rotary frequencies, the codes' token ids, the tied output layer."""
        text_model = self.hf.model.text_model
        with torch.device("cpu"):
            rotary, code_ids = type(text_model.rotary_emb)(config=text_model.config), self._code_ids()
        text_model.rotary_emb, self.code_ids = rotary.to(self.device), code_ids.to(self.device)
        if self.tied:
            self.hf.lm_head.weight = text_model.embed_tokens.weight

    def name_in_file(self, name: str) -> str | None:
        """The released files' name of an entry of the state dict; None for the output layer where it is a tied copy."""
        if self.tied and name == "hf.lm_head.weight":
            return None
        theirs, ours = next(pair for pair in PREFIXES.items() if name.startswith(pair[1]))
        return theirs + name.removeprefix(ours)

    # -- teacher forcing

    def logits(self, tokens: Tensor, condition: PromptCondition) -> Tensor:
        """Float32 logits (B,N,V) for tokens int64 (B,N); position i predicts tokens[:, i] from tokens[:, :i]."""
        if tokens.shape != (len(condition), self.num_tokens):
            raise VarpiError(
                f"Emu3.logits: tokens have shape {tuple(tokens.shape)}; {len(condition)} prompts and this generator's "
                f"{self.grid}x{self.grid} grid need ({len(condition)}, {self.num_tokens})"
            )
        prompt, grid = condition.ids.shape[1], self.grid
        rows = self.code_ids[tokens].unflatten(1, (grid, grid))
        rows = F.pad(rows, (0, 1), value=self.vocabulary[END_LINE]).flatten(1)[:, : self.inputs]
        valid = F.pad(condition.mask, (0, self.inputs), value=True)
        # Without padding no mask is needed, and the fastest attention serves.
        mask = None if valid.all() else attention_mask(valid)
        with checkpointed(self.blocks, self.gradient_checkpointing):
            hidden = self._language_model(torch.cat([condition.ids, rows], dim=1), mask)
        number = torch.arange(self.num_tokens, device=hidden.device)
        return self._head(hidden[:, prompt - 1 + number + number // grid])

    def _language_model(self, ids: Tensor, mask: Tensor | None, cache: Cache | None = None) -> Tensor:
        for layer in self.blocks:  # transformers keeps the rate twice, and what sets rates finds only the module
            layer.self_attn.attention_dropout = layer.dropout.p  # pyright: ignore[reportAttributeAccessIssue]
        start = 0 if cache is None else cache.length
        output = self.hf.model.text_model(
            input_ids=ids,
            attention_mask=mask,
            # Padding shifts a row's positions, which changes nothing: rotary embeddings tell distances alone.
            position_ids=torch.arange(start, start + ids.shape[1], device=ids.device)[None],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        """Only the rows of the output layer that belong to codes: the whole vocabulary is six times as large."""
        return F.linear(hidden, self.hf.lm_head.weight[self.code_ids]).float()

    # -- conditions

    def prepare_condition(self, condition: Any) -> PromptCondition:
        """A `PromptCondition` on this device, from one or from a list of captions.

        A caption gets the tokens around it that Emu3's own processor puts there. Raises VarpiError for class ids, and
        for prompts that leave no room for an image in the model's context.
        """
        if not isinstance(condition, PromptCondition):
            if isinstance(condition, str) or not isinstance(condition, Sequence | Tensor) or len(condition) == 0:
                raise VarpiError(f"prompts must be a list of captions, at least one, not {condition!r:.80}")
            rows = [self._token_ids(caption, i) for i, caption in enumerate(condition)]
            condition = PromptCondition.of(rows, self.pad_id)
        condition.refuse_longer_than(self._room, self.inputs)
        return condition.to(self.device)

    def _token_ids(self, caption: Any, i: int) -> list[int]:
        if not isinstance(caption, str):
            raise VarpiError(
                f"prompt {i} is of type {type(caption).__name__}; Emu3 is conditioned on text: give captions"
            )
        if self.text_tokenizer is None:
            raise VarpiError(
                f"captions need a text tokenizer, and {self.folder or 'the checkpoint'} has no tokenizer.json: put the "
                "files of the released model beside the weights"
            )
        text = self.text_tokenizer.encode(caption, add_special_tokens=False).ids
        return [self.bos_id, *text, *self._tail(self.text_tokenizer)]

    def _tail(self, tokenizer: "TextTokenizer") -> list[int]:
        """The token ids between a caption and its image."""
        size = tokenizer.encode(f"{self.grid}*{self.grid}", add_special_tokens=False).ids
        return [self.vocabulary[BEGIN_IMAGE], *size, self.vocabulary[IMAGE]]

    @property
    def caption_check(self) -> CaptionRoom | None:
        tokenizer = self.text_tokenizer
        return None if tokenizer is None else CaptionRoom(tokenizer, str, 1 + len(self._tail(tokenizer)), self._room)

    @property
    def _room(self) -> int:
        """The most tokens of a prompt."""
        return self.context - self.inputs

    def drop_condition(self, condition: PromptCondition, drop: Tensor) -> PromptCondition:
        """The prompt without its caption wherever `drop` bool (B,) is true, as in Emu3's own fine-tuning.

        The special tokens and the image's size stay; what was the caption becomes padding to the left of them all.
        """
        ids, width = condition.ids, condition.ids.shape[1]
        tail = (ids.flip(1) == self.vocabulary[BEGIN_IMAGE]).long().argmax(dim=1, keepdim=True)
        place = torch.arange(width, device=ids.device) - (width - 2 - tail)  # 0 where the sequence is to begin
        ids = ids.masked_fill(drop[:, None] & (place < 0), condition.pad_id)
        ids = ids.masked_fill(drop[:, None] & (place == 0), self.bos_id)
        return replace(condition, ids=ids, mask=condition.mask & ~(drop[:, None] & (place < 0)))

    # -- cached generation

    def new_cache(self, batch_size: int, *, static: bool = False) -> Cache:
        if static:
            raise VarpiError("Emu3 consumes one token at a step or two, at the end of a row: its shapes are not static")
        return Cache(batch_size)

    def prefill(self, condition: PromptCondition, cache: Cache) -> Tensor:
        """Float32 logits (B,V) of code 0; the cache then holds the P prompt positions."""
        visible = F.pad(condition.mask, (0, self.inputs), value=True)
        attention = self.hf.model.text_model.layers[0].self_attn
        shape = (len(condition), attention.config.num_key_value_heads, visible.shape[1], attention.head_dim)
        cache.reset(shape, len(self.blocks), self.hf.lm_head.weight, visible[:, None, None])
        return self._consume(condition.ids, 0, cache)

    def decode_step(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Consume codes (B,), all of them number `position`, int64 (); float32 logits (B,V) of the next ones.

        After the last code of a row the end of the line goes in with it.
        """
        ids, number = self.code_ids[tokens][:, None], int(position)
        if (number + 1) % self.grid == 0:
            ids = F.pad(ids, (0, 1), value=self.vocabulary[END_LINE])
        prompt = cache.visible.shape[-1] - self.inputs
        return self._consume(ids, prompt + number + number // self.grid, cache)

    def _consume(self, ids: Tensor, start: int, cache: Cache) -> Tensor:
        cache.length = start
        mask = attention_mask(cache.visible[:, 0, 0, : start + ids.shape[1]], start)
        return self._head(self._language_model(ids, mask, cache)[:, -1])


class Emu3Tokenizer(Tokenizer):
    """Emu3's image tokenizer, transformers' `Emu3VQVAE`: a video model that is given still images."""

    def __init__(self, config: "Emu3VQVAEConfig") -> None:
        super().__init__()
        self.hf: Any = transformers().Emu3VQVAE(config)
        self.codebook_size = config.codebook_size
        self.downsample: int = self.hf.spatial_scale_factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1] to int64 tokens (B,N), row-major."""
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.downsample for side in sides):
            raise VarpiError(
                f"Emu3Tokenizer.encode: images have shape {tuple(images.shape)}; they must be (B, 3, H, W) with sides "
                f"divisible by {self.downsample}"
            )
        return torch.stack(self.hf.encode(images, [sides] * len(images)).image_tokens).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B,N) of a square grid to float32 images (B,3,H,W), nominally in [-1,1], not clamped."""
        side = math.isqrt(tokens.shape[-1])
        if tokens.ndim != 2 or side * side != tokens.shape[1]:
            raise VarpiError(
                f"Emu3Tokenizer.decode: tokens have shape {tuple(tokens.shape)}; they must be (B, N) with N a square"
            )
        return self.hf.decode(tokens.unflatten(1, (side, side))).float()


# -- checkpoints


def config_for(architecture: str) -> "Emu3Config":
    """The configuration of the released "emu3-gen", with those of its tokens that generation needs."""
    vocabulary = {END_LINE: 151846, IMAGE: 151851, BEGIN_IMAGE: 151852}
    return transformers().Emu3Config(
        vocabulary_map=vocabulary | {CODE.format(code): 151854 + code for code in range(32768)}
    )


def assemble(source: Pretrained) -> Assembled:
    """The generator on the meta device and its weights by the names of its state dict; what is left over keeps its own.

    Raises VarpiError for a config.json that does not describe an Emu3 that makes images, and for compat settings.
    """
    if source.compat:
        raise VarpiError(f"{source.where}: Emu3 has no compat setting {min(source.compat)!r}; it knows none")
    config, tensors = _config(source), _tensors(source)
    table, output = "hf.model.text_model.embed_tokens.weight", "hf.lm_head.weight"
    if config.tie_word_embeddings and table in tensors:  # unless the file holds two, which is what transformers heeds
        config.tie_word_embeddings = torch.equal(tensors.setdefault(output, tensors[table]), tensors[table])
    with on_meta(source, config.text_config, config.vq_config):
        return Assembled(Emu3(config, folder=source.folder, tokenizer=text_tokenizer(source.folder)), tensors)


def assemble_tokenizer(source: Pretrained) -> Assembled:
    """Its image tokenizer on the meta device and its weights. Raises VarpiError if the checkpoint has none."""
    part, config = "hf.model.vqmodel.", _config(source)
    tensors = {f"hf.{name.removeprefix(part)}": t for name, t in _tensors(source).items() if name.startswith(part)}
    if not tensors:
        raise VarpiError(f"{source.where}: has no image tokenizer (vqmodel.*)")
    with on_meta(source, config.vq_config):
        return Assembled(Emu3Tokenizer(config.vq_config), tensors)  # pyright: ignore[reportArgumentType]


def _tensors(source: Pretrained) -> dict[str, Tensor]:
    """The checkpoint's tensors under the generator's names; unknown names stay as they are."""
    prefixes = ((name, next(filter(name.startswith, PREFIXES), "")) for name in source.tensors)
    return {PREFIXES.get(old, "") + name.removeprefix(old): source.tensors[name] for name, old in prefixes}


def _config(source: Pretrained) -> "Emu3Config":
    said = described(source, config_for)
    try:
        config: Any = transformers().Emu3Config.from_dict(copy.deepcopy(said))
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        message = " ".join(str(error).split())
        raise VarpiError(f"{source.where}: config.json does not describe an Emu3 model: {message:.200}") from error
    for part in (config, config.text_config, config.vq_config):
        part.dtype = None  # the weights have one of their own, which may be another once they are saved again
    config.varpi_grid = grid = said.get("varpi_grid", GRID)
    if type(grid) is not int or not 1 <= grid <= 1024:
        raise VarpiError(f"{source.where}: config.json says varpi_grid {grid!r}; it must be an integer from 1 to 1024")
    needed = chain((END_LINE, IMAGE, BEGIN_IMAGE), map(CODE.format, range(config.vq_config.codebook_size)))
    missing = next((name for name in needed if name not in (config.vocabulary_map or {})), None)
    if missing is not None:
        raise VarpiError(f"{source.where}: config.json's vocabulary_map has no {missing!r}; give a whole Emu3-Gen")
    return config


def shape(architecture: str, image_size: int | None) -> Emu3:
    """The released generator, without weights; its image size is always 720."""
    with torch.device("meta"):
        return Emu3(_named(architecture))


def tokenizer_shape(architecture: str, image_size: int | None) -> Emu3Tokenizer:
    """Its image tokenizer, without weights."""
    with torch.device("meta"):
        return Emu3Tokenizer(_named(architecture).vq_config)  # pyright: ignore[reportArgumentType]


def _named(architecture: str) -> "Emu3Config":
    config: Any = config_for(architecture)
    config.varpi_grid = GRID
    return config


FAMILY = Family(
    "emu3",
    ("emu3-gen",),
    generator=assemble,
    tokenizer=assemble_tokenizer,
    model_types=("emu3",),
    shapes={"generator": shape, "tokenizer": tokenizer_shape},
)
