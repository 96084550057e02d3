"""Free-running generation: cached decoding with classifier-free guidance.

Shapes: B images, N tokens per image, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.generators import Generator, concat_conditions
from varpi.objective.rollout import invert
from varpi.runtime.randomness import Stream, uniforms
from varpi.sampling.graph import Recorded, Step
from varpi.sampling.packing import packed_linears
from varpi.sampling.settings import Sampling, Schedule

IN_FLIGHT = 64
"""Images generated at once when no batch size is given."""


def generate(
    generator: Generator,
    condition: Any,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: int = -1,
    guidance_schedule: Schedule = "constant",
    guidance_power: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int | None = None,
    first: int = 0,
    batch_size: int | None = None,
    graph: bool = False,
    progress: bool = False,
) -> Tensor:
    """`generate_with` the settings given one by one; `Sampling` says what each means."""
    sampling = Sampling(
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        guidance_schedule=guidance_schedule,
        guidance_power=guidance_power,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
        seed=seed,
    )
    return generate_with(
        generator, condition, sampling, first=first, batch_size=batch_size, graph=graph, progress=progress
    )


def generate_with(
    generator: Generator,
    condition: Any,
    sampling: Sampling,
    *,
    first: int = 0,
    draws: Tensor | None = None,
    batch_size: int | None = None,
    graph: bool = False,
    progress: bool = False,
) -> Tensor:
    """Generate the tokens of one image per condition, int64 (B,N).

    condition: int64 (B,) class ids, or what else the generator understands.
    first: number of the first image, so that a large set can be made in parts: image i depends on the seed and
        `first` + i, whatever the batch size.
    draws: float32 (B,N) in [0,1), the numbers that choose the tokens, in place of a seed's.
    batch_size: images in flight at once, which bounds the memory; by default `IN_FLIGHT`.
    graph: record a step as a CUDA graph and replay it, with a static cache: for models whose step is bound by the
        launching of its kernels. On a GPU, a model that is not sharded.
    progress: show a bar on stderr.

    With a seed the global random state is neither read nor changed. The generator is put in eval mode meanwhile. Raises
    VarpiError for values out of range and for logits that are not finite.
    """
    if first < 0:
        raise VarpiError(f"first is {first}; it must be at least 0")
    if batch_size is not None and batch_size < 1:
        raise VarpiError(f"batch_size is {batch_size}; it must be at least 1")
    if graph and (generator.device.type != "cuda" or any(type(p) is not nn.Parameter for p in generator.parameters())):
        raise VarpiError("a CUDA graph needs a generator on one GPU, not sharded: leave out graph")
    condition = generator.prepare_condition(condition)
    count = len(condition)
    if draws is not None and draws.shape != (count, generator.num_tokens):
        raise VarpiError(f"draws have shape {tuple(draws.shape)}; ({count}, {generator.num_tokens}) is needed")
    if draws is None and sampling.seed is None:
        sampling = replace(sampling, seed=int(torch.randint(2**63 - 1, ())))
    tokens: list[Tensor] = []
    was_training = generator.training
    # Given draws, it is a rollout of training, whose buffers (FSDP's) must stay fit for a backward pass.
    no_gradient = torch.inference_mode() if draws is None else torch.no_grad()
    generator.eval()
    try:
        with no_gradient, _as_written(generator), Progress(console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("generating", total=count * generator.num_tokens)
            for start in range(0, count, batch_size or IN_FLIGHT):
                part = condition[start : start + (batch_size or IN_FLIGHT)]
                size, number = len(part), first + start
                if draws is None:
                    chosen = _draws(generator, sampling, range(number, number + size))
                else:
                    chosen = draws[start : start + size]
                canvas = torch.empty(size, generator.num_tokens, dtype=torch.int64, device=_device(generator))
                with packed_linears(generator, _rows(size, sampling)):
                    for _ in _fill(canvas, generator, part, sampling, chosen, graph=graph):
                        bar.advance(task, size)
                tokens.append(canvas)
    finally:
        generator.train(was_training)
    return torch.cat(tokens)  # outside inference mode, so that a training step may use the tokens


@torch.no_grad()
def generate_rows(generator: Generator, condition: Any, sampling: Sampling) -> Iterator[Tensor]:
    """The tokens that `generate_with` gives, as they are drawn: int64 (B, rows x grid) after each row of the grid.

    All images are in flight at once. Closing the iterator stops the drawing. The generator must be in eval mode, which
    several iterators may then share; the seed must be given. Raises VarpiError as `generate_with` does.
    """
    if generator.training or sampling.seed is None:
        raise VarpiError("generate_rows: needs a generator in eval mode and a seed")
    condition = generator.prepare_condition(condition)
    draws = _draws(generator, sampling, range(len(condition)))
    tokens = torch.empty(draws.shape, dtype=torch.int64, device=_device(generator))
    with packed_linears(generator, _rows(len(draws), sampling)):
        for drawn in _fill(tokens, generator, condition, sampling, draws):
            if drawn % generator.grid == 0:
                yield tokens[:, :drawn].clone()


def _device(generator: Generator) -> torch.device:
    return next(iter(generator.parameters())).device


def _rows(size: int, sampling: Sampling) -> int:
    """Sequences in flight for so many images."""
    return 2 * size if sampling.guidance_scale > 1 else size


def _as_written(generator: Generator) -> AbstractContextManager[Any]:
    """Run blocks that were compiled for training as they are written: theirs is a graph for whole sequences."""
    if any(block._compiled_call_impl is not None for block in generator.blocks):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B,V) to the float32 probabilities (B,V) that are sampled from.

    Divided by the temperature; then only the `top_k` greatest stay (with all that equal the last of them); then only
    the most probable, up to and including the first at which their sum exceeds `top_p`.
    """
    logits = logits.float() / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > sampling.top_p
        beyond = torch.cat([torch.zeros_like(beyond[..., :1]), beyond[..., :-1]], dim=-1)  # the one that crosses stays
        logits = logits.masked_fill(torch.empty_like(beyond).scatter_(-1, order, beyond), -math.inf)
    return logits.softmax(-1)


def _draws(generator: Generator, sampling: Sampling, numbers: range) -> Tensor:
    """The uniform numbers (B,N) that choose the tokens of the images of these numbers."""
    assert sampling.seed is not None
    return uniforms(sampling.seed, 0, numbers, (generator.num_tokens,), stream=Stream.GENERATION)


def _fill(
    tokens: Tensor, generator: Generator, condition: Any, sampling: Sampling, draws: Tensor, *, graph: bool = False
) -> Iterator[int]:
    """Draw the tokens (B,N) of a batch, in place; after each position, how many of the N there are.

    draws: (B,N), the batch's uniform numbers.
    """
    size, device = len(condition), tokens.device
    scales = sampling.scales(generator.num_tokens)
    guided_to = max((position for position, scale in enumerate(scales) if scale > 1), default=-1)
    guided = guided_to >= 0
    if guided:  # conditional and unconditional sequences side by side, fed the same tokens
        everywhere = torch.ones(size, dtype=torch.bool, device=device)
        condition = concat_conditions(condition, generator.drop_condition(condition, everywhere))
    cache = generator.new_cache(len(condition), static=graph)

    def step_on(cache: Any) -> Step:
        def step(tokens: Tensor, position: Tensor) -> Tensor:
            return generator.decode_step(tokens, position, cache)

        return Recorded(step) if graph else step

    step = step_on(cache)
    logits = generator.prefill(condition, cache)
    draws = draws.to(device)
    positions = torch.arange(generator.num_tokens, device=device if graph else "cpu")
    for position, scale in enumerate(scales):
        if guided and position > guided_to:  # nothing asks for the unconditional sequences any more
            guided, step = False, step_on(cache.first(size))
        if position:
            last = tokens[:, position - 1]
            last = torch.cat([last, last]) if guided else last
            logits = step(last, positions[position - 1])
        if guided:
            conditional, null = logits.chunk(2)
            logits = null + scale * (conditional - null) if scale > 1 else conditional
        if sampling.greedy:
            tokens[:, position] = logits.argmax(-1)
        else:
            tokens[:, position] = invert(filter_logits(logits, sampling), draws[:, position, None])[:, 0]
        yield position + 1
    if not logits.isfinite().all():  # once, for looking makes a GPU wait; the cache carries a NaN to the end
        raise VarpiError("the generator's logits are not finite: its weights are damaged, or overflow in their dtype")
