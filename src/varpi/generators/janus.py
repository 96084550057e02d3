"""Janus-Pro (arXiv 2501.17811): a Llama that generates images from prompts, on transformers' implementation.

Shapes: B images, N tokens per image (row-major grid), V image vocabulary, P prompt tokens, S = P + N - 1 positions.

Both released layouts load, deepseek's ("multi_modality") and transformers' ("janus"); inside, the names are
transformers'. The half that understands images is carried along, frozen.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.generators.generator import Generator
from varpi.generators.janus_files import (
    SIZES,
    SPECIAL,
    config_for,
    config_from,
    special_ids,
    transformers_name,
    transformers_tensors,
    vq_config,
    vq_tensors,
)
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
from varpi.tokenizers.vq import VQ
from varpi.tokenizers.vq_files import VQConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TextTokenizer
    from transformers import JanusConfig

__all__ = ["FAMILY", "Janus", "PromptCondition", "assemble", "assemble_tokenizer"]

COMPAT = ("shifted_logits", "attend_padding")


class Janus(Generator):
    """The generator. `logits` means the same in train and eval mode; it never drops the condition.

    config: of the transformers model, which becomes `hf`.
    compat: "shifted_logits": `logits` takes N inputs and reads position i after token i went in, as VA-π's released
        training code does by mistake. "attend_padding": a dropped row of a padded batch attends to its left padding
        too, as the all-ones mask of deepseek's code makes it; an image then depends on its batch.
    folder: where the files of the text tokenizer lie.
    tokenizer: that text tokenizer; without one, conditions must be token ids.
    ids: of the special tokens, by the keys of `SPECIAL`.
    """

    family: ClassVar[str] = "janus"

    def __init__(
        self,
        config: "JanusConfig",
        *,
        compat: Mapping[str, bool] | None = None,
        folder: Path | None = None,
        tokenizer: "TextTokenizer | None" = None,
        ids: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        vision, vq = cast(Any, config.vision_config), cast(Any, config.vq_config)
        config._attn_implementation = "sdpa"  # the one that takes the masks made here
        self.hf: Any = transformers().JanusForConditionalGeneration(config)
        self.compat = {name for name, on in (compat or {}).items() if on}
        self.folder = folder
        self.text_tokenizer = tokenizer
        self.special_ids = dict(ids or {})
        architecture = {"architectures": ["JanusForConditionalGeneration"]}
        self.hf_config = {**architecture, **json.loads(config.to_json_string())}
        self.num_tokens: int = vision.num_image_tokens
        self.grid = math.isqrt(self.num_tokens)
        self.vocab_size: int = vq.num_embeddings
        self.num_classes = None
        self.tied: bool = config.tie_word_embeddings
        model = self.hf.model
        self.hf.requires_grad_(False)
        for part in ("language_model", "generation_embeddings", "generation_aligner", "generation_head"):
            model.get_submodule(part).requires_grad_(True)
        if self.tied:  # the table is the understanding half's output layer too
            model.language_model.embed_tokens.requires_grad_(False)

    @property
    def blocks(self) -> nn.ModuleList:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.hf.model.language_model.layers

    def reset_tables(self) -> None:
        """Make what no checkpoint holds again: rotary frequencies, SigLIP's position ids, the tied output layer."""
        language_model, embeddings = self.hf.model.language_model, self.hf.model.vision_model.embeddings
        with torch.device("cpu"):
            rotary = type(language_model.rotary_emb)(config=language_model.config)
            positions = torch.arange(embeddings.num_positions)[None]
        language_model.rotary_emb = rotary.to(self.device)
        embeddings.position_ids = positions.to(self.device)
        if self.tied:
            self.hf.lm_head.weight = language_model.embed_tokens.weight

    def name_in_file(self, name: str) -> str | None:
        """Transformers' name of an entry of the state dict; None for the output layer where it is a tied copy."""
        return None if self.tied and name == "hf.lm_head.weight" else name.removeprefix("hf.")

    # -- teacher forcing

    def logits(self, tokens: Tensor, condition: PromptCondition) -> Tensor:
        """Float32 logits (B,N,V) for tokens int64 (B,N); position i predicts tokens[:, i] from tokens[:, :i].

        With `shifted_logits` position i has seen tokens[:, :i + 1], what it is to predict included.
        """
        if tokens.shape != (len(condition), self.num_tokens):
            raise VarpiError(
                f"Janus.logits: tokens have shape {tuple(tokens.shape)}; {len(condition)} prompts and this generator's "
                f"{self.grid}x{self.grid} grid need ({len(condition)}, {self.num_tokens})"
            )
        shifted = "shifted_logits" in self.compat
        prompt, images = self._embed_prompt(condition), self._embed_images(tokens if shifted else tokens[:, :-1])
        valid = F.pad(condition.mask, (0, images.shape[1]), value=True)
        whole = valid.all()  # without padding no mask is needed, and the fastest attention serves
        with checkpointed(self.blocks, self.gradient_checkpointing):
            hidden = self._language_model(
                torch.cat([prompt, images], dim=1),
                None if whole else attention_mask(valid),
                None if whole else _positions(valid),
            )
        return self._head(hidden[:, -self.num_tokens :])

    def _embed_prompt(self, condition: PromptCondition) -> Tensor:
        return self.hf.model.language_model.embed_tokens(condition.ids)

    def _embed_images(self, tokens: Tensor) -> Tensor:
        return self.hf.prepare_embeddings_for_image_generation(tokens)

    def _language_model(
        self, embeddings: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        output = self.hf.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def _head(self, hidden: Tensor) -> Tensor:
        return self.hf.model.generation_head(hidden).float()

    # -- conditions

    def prepare_condition(self, condition: Any) -> PromptCondition:
        """A `PromptCondition` on this device, from one, or from a list of captions or of lists of token ids.

        A caption gets the dialogue that Janus-Pro was trained on around it; token ids are used as they are. Raises
        VarpiError for class ids, for blank captions, and for what the model's vocabulary or context cannot hold.
        """
        if not isinstance(condition, PromptCondition):
            rows = self._token_ids(condition)
            condition = PromptCondition.of(rows, self._special_id("pad_token_id"))
        vocabulary = self.hf.config.text_config.vocab_size
        condition.refuse_longer_than(self._room, self.num_tokens)
        wrong = condition.ids[(condition.ids < 0) | (condition.ids >= vocabulary)]
        if len(wrong):
            raise VarpiError(f"token id {int(wrong[0])} is out of range: this model's text vocabulary has {vocabulary}")
        return condition.to(self.device)

    @property
    def caption_check(self) -> CaptionRoom | None:
        return None if self.text_tokenizer is None else CaptionRoom(self.text_tokenizer, dialogue, 2, self._room)

    @property
    def _room(self) -> int:
        """The most tokens of a prompt."""
        return self.hf.config.text_config.max_position_embeddings - self.num_tokens

    def drop_condition(self, condition: PromptCondition, drop: Tensor) -> PromptCondition:
        """The empty prompt wherever `drop` bool (B,) is true: all but a prompt's first and last token become padding.

        The prompt keeps its length: padding in the place of its tokens is attended to, as in deepseek's sampling code.
        """
        place = torch.arange(condition.ids.shape[1], device=condition.ids.device)
        first = condition.mask.long().argmax(dim=1)  # the beginning of the sequence; the last one begins the image
        kept = (place == first[:, None]) | (place == len(place) - 1)
        ids = condition.ids.masked_fill(drop[:, None] & ~kept, condition.pad_id)
        mask = condition.mask | drop[:, None] if "attend_padding" in self.compat else condition.mask
        return replace(condition, ids=ids, mask=mask)

    def _token_ids(self, prompts: Any) -> list[list[int]]:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence | Tensor) or len(prompts) == 0:
            raise VarpiError(f"prompts must be a list of captions, at least one, not {_short(prompts)}")
        rows = []
        for i, prompt in enumerate(prompts.tolist() if isinstance(prompts, Tensor) else prompts):
            if isinstance(prompt, str):
                rows.append(self._tokenize(prompt, i))
            elif isinstance(prompt, Sequence) and prompt and all(isinstance(token, int) for token in prompt):
                rows.append(list(prompt))
            elif isinstance(prompt, int):
                raise VarpiError(
                    f"prompt {i} is the class id {prompt}; Janus-Pro is conditioned on text: give captions"
                )
            else:
                raise VarpiError(f"prompt {i} is {_short(prompt)}; Janus-Pro reads captions, or lists of token ids")
        return rows

    def _tokenize(self, caption: str, i: int) -> list[int]:
        if not caption.strip():
            raise VarpiError(f"prompt {i} is blank; Janus-Pro needs a caption for each image")
        if self.text_tokenizer is None:
            raise VarpiError(
                f"captions need a text tokenizer, and {self.folder or 'the checkpoint'} has no tokenizer.json: put "
                "the files of the released model beside the weights, or give token ids"
            )
        # Whether a tokenizer adds the first token by itself differs between the released files.
        middle = self.text_tokenizer.encode(dialogue(caption), add_special_tokens=False).ids
        return [self._special_id("bos_token_id"), *middle, self._special_id("boi_token_id")]

    def _special_id(self, name: str) -> int:
        if name not in self.special_ids:
            raise VarpiError(
                f"{self.folder or 'the checkpoint'}: neither tokenizer.json nor generation_config.json tells the id of "
                f"{SPECIAL[name]!r} ({name}): put the files of the released model beside the weights"
            )
        return self.special_ids[name]

    # -- cached generation; `shifted_logits` has no part in it, as it has none in the released sampling code

    def new_cache(self, batch_size: int, *, static: bool = False) -> Cache:
        return Cache(batch_size, static=static)

    def prefill(self, condition: PromptCondition, cache: Cache) -> Tensor:
        """Float32 logits (B,V) of image token 0; the cache then holds the P prompt positions."""
        config, prompt = self.hf.config.text_config, self._embed_prompt(condition)
        visible = F.pad(condition.mask, (0, self.num_tokens - 1), value=True)  # the last token is never an input
        shape = (len(condition), config.num_key_value_heads, visible.shape[1], config.head_dim)
        cache.reset(shape, len(self.blocks), prompt, visible[:, None, None])
        hidden = self._language_model(prompt, attention_mask(condition.mask), _positions(condition.mask), cache)
        return self._head(hidden[:, -1])

    def decode_step(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Consume image tokens (B,), all of them number `position`, int64 (); float32 logits (B,V) of the next ones."""
        prompt = cache.visible.shape[-1] - (self.num_tokens - 1)
        if cache.static:
            cache.at = position.to(tokens.device)[None] + prompt
            visible = cache.visible & (torch.arange(cache.visible.shape[-1], device=tokens.device) <= cache.at)
        else:
            cache.length = prompt + int(position)
            visible = cache.visible[..., : cache.length + 1]
        hidden = self._language_model(self._embed_images(tokens[:, None]), visible, visible[:, 0].sum(-1) - 1, cache)
        return self._head(hidden[:, -1])


def dialogue(caption: str) -> str:
    """What Janus-Pro was trained to answer with an image."""
    return f"<|User|>: {caption.strip()}\n\n<|Assistant|>:"


def _short(value: object) -> str:
    return " ".join(f"{value!r:.80}".split())


def _positions(valid: Tensor) -> Tensor:
    """Int64 (B,S): each valid position's number among the valid ones."""
    return (valid.long().cumsum(dim=1) - 1).clamp(min=0)


# -- checkpoints


def assemble(source: Pretrained) -> Assembled:
    """The generator on the meta device and its weights by the names of its state dict; what is left over keeps its own.

    Raises VarpiError for a checkpoint that cannot generate images and for compat settings that Janus does not know.
    """
    where, tensors = source.where, transformers_tensors(source.tensors)
    if unknown := sorted(set(source.compat) - set(COMPAT)):
        raise VarpiError(f"{where}: Janus has no compat setting {unknown[0]!r}; known are {', '.join(COMPAT)}")
    for part, what in (("language_model", "language model"), ("generation_head", "image head")):
        if not any(name.startswith(f"model.{part}.") for name in tensors):
            raise VarpiError(
                f"{where}: has no {what} (model.{part}.*), so it cannot generate images: give a Janus-Pro checkpoint"
            )
    said = described(source, config_for)
    config = config_from(where, said, tensors)
    embedding, output = "model.language_model.embed_tokens.weight", "lm_head.weight"
    if config.tie_word_embeddings and {embedding, output} <= set(tensors):
        # as transformers does: converted files say that they are tied without meaning it
        config.tie_word_embeddings = torch.equal(tensors[embedding], tensors[output])
    tokenizer = text_tokenizer(source.folder)
    ids = special_ids(source.folder, said, tokenizer)
    config.image_token_id = ids.get("image_token_id", config.image_token_id)
    with on_meta(source, config.text_config, config.vision_config, config.vq_config):
        generator = Janus(config, compat=source.compat, folder=source.folder, tokenizer=tokenizer, ids=ids)
    if generator.tied and embedding in tensors:
        tensors[output] = tensors[embedding]
    known = {name.removeprefix("hf.") for name in generator.state_dict()}
    own = {transformers_name(name): name for name in source.tensors}
    weights = {f"hf.{name}" if name in known else own.get(name, name): tensor for name, tensor in tensors.items()}
    return Assembled(generator, weights)


def assemble_tokenizer(source: Pretrained) -> Assembled:
    """Its image tokenizer on the meta device and its weights; the shape is what the tensors say.

    Codes are compared as unit vectors, as in deepseek's code and unlike in transformers' `vqmodel.encode`.
    Raises VarpiError if the checkpoint has none.
    """
    weights = vq_tensors(source.tensors)
    if not weights:
        raise VarpiError(f"{source.where}: has no image tokenizer (model.vqmodel.* or gen_vision_model.*)")
    with torch.device("meta"):
        tokenizer = VQ(vq_config(source.where, weights))
    # transformers leaves out this statistic, which nothing reads
    weights.setdefault("quantize.codebook_used", torch.zeros(tokenizer.quantize.codebook_used.shape))
    return Assembled(tokenizer, weights)


def shape(architecture: str, image_size: int | None) -> Janus:
    """The generator of a name, without weights, for token ids; its image size is always 384."""
    with torch.device("meta"):
        return Janus(config_for(architecture), ids=dict.fromkeys(SPECIAL, 0))


def tokenizer_shape(architecture: str, image_size: int | None) -> VQ:
    """Its image tokenizer, without weights."""
    with torch.device("meta"):
        return VQ(VQConfig())


FAMILY = Family(
    "janus",
    tuple(SIZES),
    generator=assemble,
    tokenizer=assemble_tokenizer,
    model_types=("janus", "multi_modality"),
    shapes={"generator": shape, "tokenizer": tokenizer_shape},
)
