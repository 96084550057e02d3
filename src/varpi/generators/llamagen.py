"""LlamaGen's GPT (arXiv 2406.06525), class- or text-conditional, exact enough to load the released weights.

Shapes: B images, N tokens per image (grid x grid, row-major), L condition tokens, S = L + N - 1 positions, D width,
H heads, E = D / H, V vocabulary.

Two traits of the released code are part of what the weights were trained with and are kept:
the rotary table is zero, not identity, at the condition positions, so their queries and keys vanish (their values do
not); and the last grid position is never an input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from varpi.errors import VarpiError
from varpi.generators.generator import Generator
from varpi.generators.llamagen_files import (
    ARCHITECTURES,
    LlamaGenConfig,
    config_for,
    config_from,
    is_table,
    original_name,
)
from varpi.runtime.pretrained import Assembled, Family, Pretrained
from varpi.runtime.sizes import on_cpu
from varpi.runtime.sources import few

__all__ = ["FAMILY", "LlamaGen", "LlamaGenConfig", "TextCondition"]


@dataclass(frozen=True)
class TextCondition:
    """Caption features for text-conditional LlamaGen.

    features: float (B,L,C), left-padded, so that a caption's valid positions are the last ones.
    mask: bool (B,L), true where valid.
    """

    features: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> "TextCondition":
        return TextCondition(self.features[index], self.mask[index])

    def to(self, device: torch.device | str) -> "TextCondition":
        return TextCondition(self.features.to(device), self.mask.to(device))

    def concat(self, other: "TextCondition") -> "TextCondition":
        return TextCondition(torch.cat([self.features, other.features]), torch.cat([self.mask, other.mask]))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """In float32, rounded to x's dtype before the weight is applied."""
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps) * self.weight


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


GROWTH = 16
"""Positions by which a cache on the CPU grows: a step in bfloat16 there reads the room that there is, not what is
written."""


@dataclass
class LayerCache:
    """Keys and values (B,H,S,E) of one layer, written in place as positions are consumed."""

    keys: Tensor
    values: Tensor


@dataclass
class Cache:
    layers: list[LayerCache]
    static: bool
    """Whether decoding attends to all of it under a mask, rather than to what is written."""
    mask: Tensor | None = None
    """Bool (B,1,1,L+N), true where a key may be seen; set by `prefill` for text, None for classes."""

    def first(self, count: int) -> "Cache":
        """That of the first `count` sequences, in the same memory until either grows."""
        layers = [LayerCache(layer.keys[:count], layer.values[:count]) for layer in self.layers]
        return Cache(layers, self.static, None if self.mask is None else self.mask[:count])

    def grow_to(self, end: int) -> None:
        """Make room for `end` positions and up to `GROWTH` more; those that are written stay."""
        if end > self.layers[0].keys.shape[2]:
            for layer in self.layers:
                more = end + GROWTH - 1 - layer.keys.shape[2]
                layer.keys, layer.values = (F.pad(part, (0, 0, 0, more)) for part in (layer.keys, layer.values))


class Attention(nn.Module):
    def __init__(self, dim: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
        start: int | Tensor = 0,
    ) -> Tensor:
        """x (B,S,D), rotary (S,E/2,2). Positions start.. of the cache, when there is one, are written and seen.

        start: a tensor, int64 (1,), for S = 1: all of the cache is then seen, as far as the mask lets it.
        """
        batch, length, dim = x.shape
        qk, v = self.qkv(x).view(batch, length, 3, self.n_head, dim // self.n_head).split([2, 1], dim=2)
        q, k, v = (part.transpose(1, 2) for part in (*rotate(qk, rotary).unbind(2), v[:, :, 0]))
        if cache is not None and isinstance(start, Tensor):
            k = cache.keys.index_copy_(2, start, k.type_as(cache.keys))
            v = cache.values.index_copy_(2, start, v.type_as(cache.values))
        elif cache is not None:
            end = start + length
            cache.keys[:, :, start:end] = k
            cache.values[:, :, start:end] = v
            if length == 1 and q.dtype == cache.keys.dtype == torch.bfloat16 and q.device.type == "cpu":
                x = attend_once(q, cache.keys, cache.values, int(end), mask)
                return self.out(x.transpose(1, 2).reshape(batch, length, dim))
            k, v = cache.keys[:, :, :end], cache.values[:, :, :end]
        x = attend(q, k.type_as(q), v.type_as(q), mask)
        return self.out(x.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        assert config.ffn_dim is not None
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config.dim, config.n_head)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
        start: int | Tensor = 0,
    ) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, cache, start))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class CaptionEmbedding(nn.Module):
    """Caption features (B,L,C) to condition tokens (B,L,D). `null` (L,C) stands for "no caption" and is a constant."""

    null: Tensor

    def __init__(self, tokens: int, caption_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(caption_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.register_buffer("null", torch.randn(tokens, caption_dim) / caption_dim**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))


class LlamaGen(Generator):
    """The generator. `logits` means the same in train and eval mode, dropout aside; it never drops the condition."""

    family: ClassVar[str] = "llamagen"
    rotary: Tensor

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        assert config.condition_tokens is not None
        self.config = config
        self.vocab_size = config.vocab_size
        self.grid = config.grid
        self.num_tokens = config.grid**2
        self.num_classes = config.num_classes if config.conditioning == "class" else None
        self.condition_tokens = config.condition_tokens
        if config.conditioning == "text":
            self.caption_features = (config.condition_tokens, config.caption_dim)
        if config.conditioning == "class":  # the last row is the null class, whatever the drop rate
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        else:
            self.caption_embedding = CaptionEmbedding(config.condition_tokens, config.caption_dim, config.dim)
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_tables()
        self.apply(_init_weights)
        nn.init.zeros_(self.output.weight)

    def reset_tables(self) -> None:
        """Make the rotary table again."""
        table = rotary_table(self.config)
        self.register_buffer("rotary", table.to(self.token_embedding.weight.device), persistent=False)

    def name_in_file(self, name: str) -> str:
        return original_name(name)

    # -- teacher forcing

    def logits(self, tokens: Tensor, condition: Any) -> Tensor:
        """Float32 logits (B,N,V) for tokens int64 (B,N); position i predicts tokens[:, i] from tokens[:, :i].

        condition: int64 (B,) class ids, `num_classes` being the null class, or a `TextCondition`.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.num_tokens:
            raise VarpiError(
                f"LlamaGen.logits: tokens have shape {tuple(tokens.shape)}; this generator's {self.grid}x{self.grid} "
                f"grid needs (B, {self.num_tokens})"
            )
        prefix = self._embed_condition(condition)
        x = self.dropout(torch.cat([prefix, self.token_embedding(tokens[:, :-1]).type_as(prefix)], dim=1))
        mask = self._text_mask(condition, x.shape[1]) if isinstance(condition, TextCondition) else None
        rotary = self.rotary[: x.shape[1]]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, use_reentrant=False)
            else:
                x = block(x, rotary, mask)
        return self.output(self.norm(x[:, self.condition_tokens - 1 :])).float()

    # -- conditions

    def prepare_condition(self, condition: Any) -> Any:
        """A `TextCondition` from itself, captions or features (text); int64 (B,) from class ids (class)."""
        if self.config.conditioning == "text":
            return self._text_condition(condition).to(self.device)
        try:
            ids = torch.as_tensor(condition)
        except (TypeError, ValueError, RuntimeError) as error:
            raise VarpiError(
                f"class ids must be whole numbers, not {condition!r:.80}: this generator is conditioned on classes"
            ) from error
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.ndim != 1 or len(ids) == 0:
            raise VarpiError(f"class ids must be a non-empty 1-D integer tensor, not {ids.dtype} {tuple(ids.shape)}")
        wrong = ids[(ids < 0) | (ids > self.config.num_classes)]
        if len(wrong):
            raise VarpiError(
                f"class id {int(wrong[0])} is out of range: this generator knows 0 to {self.config.num_classes - 1} "
                f"({self.config.num_classes} is the null class)"
            )
        return ids.long().to(self.device)

    def _text_condition(self, condition: Any) -> TextCondition:
        """Captions encoded, features padded on the left, and everything of the right size."""
        if isinstance(condition, Sequence) and condition and all(isinstance(entry, str) for entry in condition):
            if self.text_encoder is None:
                raise VarpiError(
                    "captions need a text encoder, for this generator reads caption features: give one "
                    "(generator.text_encoder, --text-encoder), or features that `varpi encode captions` wrote"
                )
            condition = self.text_encoder(condition)
        if isinstance(condition, Sequence) and condition and all(isinstance(entry, Tensor) for entry in condition):
            return self._pad([feature.squeeze(0) if feature.ndim == 3 else feature for feature in condition])
        if not isinstance(condition, TextCondition):
            what = condition[0] if isinstance(condition, Sequence) and condition else condition
            raise VarpiError(
                f"this generator is conditioned on text: it needs captions, caption features or a TextCondition, not "
                f"{type(what).__name__}"
            )
        expected = (self.condition_tokens, self.config.caption_dim)
        if condition.features.ndim != 3 or tuple(condition.features.shape[1:]) != expected:
            raise VarpiError(
                f"caption features have shape {tuple(condition.features.shape)}; this generator needs (B, "
                f"{expected[0]}, {expected[1]})"
            )
        if condition.mask.shape != condition.features.shape[:2]:
            raise VarpiError(
                f"caption mask has shape {tuple(condition.mask.shape)}; features need "
                f"{tuple(condition.features.shape[:2])}"
            )
        return condition

    def _pad(self, features: Sequence[Tensor]) -> TextCondition:
        """Features (L,C) of each caption, of one width, zero-padded on the left to this generator's length."""
        length, width = self.condition_tokens, self.config.caption_dim
        for feature in features:
            if feature.ndim != 2 or feature.shape[1] != width or not 1 <= len(feature) <= length:
                raise VarpiError(
                    f"caption features have shape {tuple(feature.shape)}; this generator needs (L, {width}) with L "
                    f"from 1 to {length}: were they made by another text encoder?"
                )
        padded = torch.stack([F.pad(feature.float(), (0, 0, length - len(feature), 0)) for feature in features])
        valid = torch.tensor([len(feature) for feature in features], device=padded.device)
        return TextCondition(padded, torch.arange(length, device=padded.device) >= length - valid[:, None])

    def drop_condition(self, condition: Any, drop: Tensor) -> Any:
        """The null class, or the null caption (its mask unchanged), wherever `drop` bool (B,) is true."""
        if isinstance(condition, TextCondition):
            null = self.caption_embedding.null.to(condition.features)
            return TextCondition(torch.where(drop[:, None, None], null, condition.features), condition.mask)
        return condition.masked_fill(drop, self.config.num_classes)

    def _embed_condition(self, condition: Any) -> Tensor:
        if isinstance(condition, TextCondition):
            return self.caption_embedding(condition.features.to(self.caption_embedding.fc1.weight.dtype))
        return self.class_embedding(condition)[:, None]

    def _text_mask(self, condition: TextCondition, length: int) -> Tensor:
        """Bool (B,1,S,S): causal, padded condition columns hidden, every position sees itself."""
        device = condition.mask.device
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril().repeat(len(condition), 1, 1)
        mask[:, :, : self.condition_tokens] &= condition.mask.bool()[:, None, :]
        mask |= torch.eye(length, dtype=torch.bool, device=device)
        return mask[:, None]

    # -- cached generation

    def new_cache(self, batch_size: int, *, static: bool = False) -> Cache:
        """A cache in the module's dtype, on its device: of L + N positions; on the CPU, unless static, it grows."""
        weight = self.output.weight
        grows = weight.device.type == "cpu" and not static
        positions = 0 if grows else self.condition_tokens + self.num_tokens
        shape = (batch_size, self.config.n_head, positions, self.config.dim // self.config.n_head)

        def room() -> Tensor:  # of its own, also where the weight is a part of a sharded one
            return torch.zeros(shape, device=weight.device, dtype=weight.dtype)

        return Cache([LayerCache(room(), room()) for _ in self.blocks], static)

    def prefill(self, condition: Any, cache: Cache) -> Tensor:
        """Float32 logits (B,V) of image token 0; the cache then holds the L condition positions."""
        x = self._embed_condition(condition)
        mask = None
        if isinstance(condition, TextCondition):
            mask = self._text_mask(condition, self.condition_tokens)
            visible = torch.ones(len(condition), self.num_tokens, dtype=torch.bool, device=x.device)
            cache.mask = torch.cat([condition.mask.bool(), visible], dim=1)[:, None, None]
        return self._cached(x, self.rotary[: x.shape[1]], mask, cache, 0)

    def decode_step(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Consume image tokens (B,), all of them number `position`, int64 (); float32 logits (B,V) of the next ones."""
        x = self.token_embedding(tokens)[:, None]
        if cache.static:
            at = position.to(x.device)[None] + self.condition_tokens
            mask = torch.arange(self.condition_tokens + self.num_tokens, device=x.device) <= at
            if cache.mask is not None:
                mask = mask & cache.mask
            return self._cached(x, self.rotary.index_select(0, at), mask.expand(len(x), 1, 1, -1), cache, at)
        start = self.condition_tokens + int(position)
        mask = None if cache.mask is None else cache.mask[..., : start + 1]
        return self._cached(x, self.rotary[start : start + 1], mask, cache, start)

    def _cached(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: Cache, start: int | Tensor) -> Tensor:
        if not isinstance(start, Tensor):
            cache.grow_to(start + x.shape[1])
        x = self.dropout(x)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, rotary, mask, layer, start)
        return self.output(self.norm(x[:, -1])).float()


def rotary_table(config: LlamaGenConfig) -> Tensor:
    """Float32 (L + N, E/2, 2) of (cos, sin): the first E/4 pairs turn with the row, the others with the column.

    The L condition rows are zero.
    """
    assert config.condition_tokens is not None
    pairs_per_axis = config.dim // config.n_head // 4
    frequency = config.rope_base ** (-torch.arange(pairs_per_axis, device="cpu").float() / pairs_per_axis)
    angle = torch.arange(config.grid, device="cpu").float()[:, None] * frequency  # (grid, E/4)
    rows = angle[:, None].expand(config.grid, config.grid, pairs_per_axis)
    columns = angle[None].expand(config.grid, config.grid, pairs_per_axis)
    angles = torch.cat([rows, columns], dim=-1).reshape(config.grid**2, 2 * pairs_per_axis)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([table.new_zeros(config.condition_tokens, *table.shape[1:]), table])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn the interleaved pairs of x (B,S,2,H,E), queries and keys, by rotary (S,E/2,2), in float32."""
    pairs, rotary = x.float().unflatten(-1, (-1, 2)), rotary.float()[:, None, None]
    if not torch.compiler.is_compiling():  # one product, to the bit what the four below are
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotary))
    else:  # what inductor can fuse
        (even, odd), (cos, sin) = pairs.unbind(-1), rotary.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B,H,S,E) to k and v (B,H,T,E) under a mask, bool (…,S,T); without one causal, or with S = 1 all.

    In bfloat16 on a CPU the backward pass of torch's own kernel takes two to six times as long as that of products
    written out.
    """
    causal = mask is None and q.shape[2] > 1
    if not (on_cpu(q) and q.dtype == torch.bfloat16 and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).type_as(v) @ v


def attend_once(q: Tensor, keys: Tensor, values: Tensor, end: int, mask: Tensor | None) -> Tensor:
    """Attention of a single query to the first `end` of a whole cache: q (B,H,1,E), keys and values (B,H,S,E).

    mask: bool (B,1,1,end), or None for all. For bfloat16 on the CPU, where torch's own kernel takes two to five times
    as long, and where its product would copy a part of the cache.
    """
    batch, heads = q.shape[:2]
    scores = torch.bmm(keys.flatten(0, 1), (q * q.shape[-1] ** -0.5).flatten(0, 1).mT)
    scores = scores.view(batch, heads, 1, -1).float()
    scores[..., end:] = -torch.inf
    if mask is not None:
        scores[..., :end].masked_fill_(~mask, -torch.inf)
    weights = scores.softmax(-1).type_as(values)
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).unflatten(0, (batch, heads))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def assemble(source: Pretrained) -> Assembled:
    """The generator on the meta device, its weights under the names of the file: original ones, or varpi's own."""
    if source.compat:
        raise VarpiError(f"generator.compat: LlamaGen has no switch {few(source.compat)}")
    native = bool(source.config) or "token_embedding.weight" in source.tensors
    tensors = {name: tensor for name, tensor in source.tensors.items() if not is_table(name)}
    config, said = config_from(source, {original_name(name): tensor for name, tensor in tensors.items()})
    with torch.device("meta"):
        generator = LlamaGen(config)
    return Assembled(generator, tensors, said, str if native else original_name)


def shape(architecture: str, image_size: int | None) -> LlamaGen:
    """The generator of a name, without weights, for images of VQ-16."""
    with torch.device("meta"):
        return LlamaGen(config_for(architecture, (image_size or 256) // 16))


FAMILY = Family(
    "llamagen",
    ARCHITECTURES,
    generator=assemble,
    known_by=("tok_embeddings.weight", "token_embedding.weight"),
    config=LlamaGenConfig,
    build=LlamaGen,
    shapes={"generator": shape},
)
