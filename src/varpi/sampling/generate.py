"""Free-running generation: cached decoding with classifier-free guidance.

Shapes: B images, N tokens per image, V vocabulary. Guidance follows LlamaGen's sampler (arXiv 2406.06525) and the
power-cosine schedule of VA-π's released one.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from varpi.errors import VarpiError
from varpi.generators import Generator, concat_conditions
from varpi.runtime.randomness import Stream, uniforms

IN_FLIGHT = 64
"""Images generated at once when no batch size is given."""


def generate(
    generator: Generator,
    condition: Any,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: int = -1,
    guidance_schedule: Literal["constant", "power-cosine"] = "constant",
    guidance_power: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int | None = None,
    first: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Generate the tokens of one image per condition, int64 (B,N).

    condition: int64 (B,) class ids, or what else the generator understands.
    guidance_scale: s >= 0 in `null + s (conditional - null)`. Up to 1 means no guidance, which costs half as much.
    guidance_interval: when k >= 0, guide only the first token and decoding steps 0..k; step i makes token i + 1.
    guidance_schedule: "power-cosine" gives the first token the full scale and decoding step i of M = N - 1 the scale
        1 + (s - 1) (1 - cos(π (i / M) ** guidance_power)) / 2.
    temperature > 0; top_k >= 0 (0: all); top_p in (0, 1] (1: all): see `filter_logits`.
    greedy: the most probable token, always.
    seed: in [0, 2**63). Image i depends on the seed and `first` + i, whatever the batch size; the global random state
        is neither read nor changed. Without a seed one is drawn from the global random state.
    first: number of the first image, so that a large set can be made in parts.
    batch_size: images in flight at once, which bounds the memory; by default `IN_FLIGHT`.
    progress: show a bar on stderr.

    The generator is put in eval mode meanwhile. Raises VarpiError for values out of range.
    """
    if not 0 <= guidance_scale < math.inf:
        raise VarpiError(f"guidance_scale is {guidance_scale}; it must be at least 0 and finite")
    if guidance_interval < -1:
        raise VarpiError(f"guidance_interval is {guidance_interval}; it must be at least 0, or -1 for none")
    if guidance_schedule not in ("constant", "power-cosine"):
        raise VarpiError(f"guidance_schedule is {guidance_schedule!r}; it must be 'constant' or 'power-cosine'")
    if not 0 < guidance_power < math.inf:
        raise VarpiError(f"guidance_power is {guidance_power}; it must be above 0 and finite")
    if seed is not None and not 0 <= seed < 2**63:
        raise VarpiError(f"seed is {seed}; it must be in [0, 2**63)")
    if first < 0:
        raise VarpiError(f"first is {first}; it must be at least 0")
    if batch_size is not None and batch_size < 1:
        raise VarpiError(f"batch_size is {batch_size}; it must be at least 1")
    _check_filter(temperature, top_k, top_p)
    condition = generator.prepare_condition(condition)
    count = len(condition)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    scales = _scales(generator.num_tokens, guidance_scale, guidance_interval, guidance_schedule, guidance_power)

    def sample(logits: Tensor, draws: Tensor) -> Tensor:
        if greedy:
            return logits.argmax(-1)
        return _draw(filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p), draws)

    tokens: list[Tensor] = []
    was_training = generator.training
    generator.eval()
    try:
        with torch.inference_mode(), Progress(console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("generating", total=count * generator.num_tokens)
            for start in range(0, count, batch_size or IN_FLIGHT):
                part = condition[start : start + (batch_size or IN_FLIGHT)]
                size, number = len(part), first + start
                draws = uniforms(
                    seed, 0, range(number, number + size), (generator.num_tokens,), stream=Stream.GENERATION
                )
                tokens.append(_decode(generator, part, scales, draws, sample, lambda n=size: bar.advance(task, n)))
    finally:
        generator.train(was_training)
    return torch.cat(tokens)  # outside inference mode, so that a training step may use the tokens


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (B,V) to the float32 probabilities (B,V) that are sampled from.

    Divided by the temperature; then only the `top_k` greatest stay (with all that equal the last of them; 0: all); then
    only the most probable, up to and including the first at which their sum exceeds `top_p` (1: all).
    """
    _check_filter(temperature, top_k, top_p)
    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > top_p
        beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)  # the one that crosses stays
        logits = logits.masked_fill(torch.empty_like(beyond).scatter_(-1, order, beyond), -math.inf)
    return logits.softmax(-1)


def _check_filter(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 < temperature < math.inf:
        raise VarpiError(f"temperature is {temperature}; it must be above 0 and finite (for the most probable: greedy)")
    if top_k < 0:
        raise VarpiError(f"top_k is {top_k}; it must be at least 1, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise VarpiError(f"top_p is {top_p}; it must be in (0, 1]")


def _scales(num_tokens: int, scale: float, interval: int, schedule: str, power: float) -> list[float]:
    """The guidance scale of each token. The first comes from the prefill, which knows neither interval nor schedule."""
    steps = num_tokens - 1
    scales = [scale]
    for i in range(steps):
        if 0 <= interval < i:
            scales.append(1.0)
        elif schedule == "power-cosine":
            scales.append(1 + (scale - 1) * (1 - math.cos(math.pi * (i / steps) ** power)) / 2)
        else:
            scales.append(scale)
    return scales


def _decode(
    generator: Generator,
    condition: Any,
    scales: list[float],
    draws: Tensor,
    sample: Callable[[Tensor, Tensor], Tensor],
    advance: Callable[[], None],
) -> Tensor:
    """The tokens (B,N) of a batch, one after the other; `draws` (B,N) are its uniform numbers."""
    size, device = len(condition), next(iter(generator.parameters())).device
    guided = scales[0] > 1
    if guided:  # conditional and unconditional sequences side by side, fed the same tokens
        everywhere = torch.ones(size, dtype=torch.bool, device=device)
        condition = concat_conditions(condition, generator.drop_condition(condition, everywhere))
    cache = generator.new_cache(len(condition))
    logits = generator.prefill(condition, cache)
    draws = draws.to(device)
    tokens = torch.empty(size, generator.num_tokens, dtype=torch.int64, device=device)
    for position, scale in enumerate(scales):
        if position:
            last = tokens[:, position - 1]
            logits = generator.decode_step(torch.cat([last, last]) if guided else last, position - 1, cache)
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + scale * (conditional - null) if scale > 1 else conditional
        tokens[:, position] = sample(logits, draws[:, position])
        advance()
    if not logits.isfinite().all():  # once, for looking makes a GPU wait; the cache carries a NaN to the end
        raise VarpiError("the generator's logits are not finite: its weights are damaged, or overflow in their dtype")
    return tokens


def _draw(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Invert the cumulative distribution of probabilities (B,V) at the uniform numbers (B,): int64 (B,).

    Summed in integers: their sums are exact in any order, so that rounding never picks a token of probability zero.
    Where the probabilities are NaN the last token comes out, a valid index.
    """
    cumulative = (probabilities.double() * 2.0**48).long().cumsum(-1)
    threshold = (draws.double()[:, None] * cumulative[:, -1:]).long()  # below the total, for draws are
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=cumulative.shape[-1] - 1)
