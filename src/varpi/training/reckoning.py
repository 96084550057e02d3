"""What a recipe would take, before any of it is begun: memory by part and the work of a step.

The recipe's own method and loop run on tensors that have sizes and no numbers (`varpi.runtime.ledger`), so whatever a
setting changes is counted where it happens, and neither weights nor data need be here.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import yaml

from varpi.data import Batch
from varpi.errors import VarpiError
from varpi.methods import Method, build_method, generator_of
from varpi.recipe import Recipe, apply_setting, parse_recipe
from varpi.runtime.ledger import Ledger, LedgerStages, Stage, enter
from varpi.runtime.memory import physical_memory
from varpi.runtime.processes import World
from varpi.runtime.sizes import as_on_a_card, without_weights
from varpi.training.average import Average
from varpi.training.loop import Trainer
from varpi.training.optimizer import make_optimizer
from varpi.training.state import Progress
from varpi.weights.pair import open_generator

PROMPT = 100
"""Tokens of a prompt, for a generator that reads them."""
PROCESS_OVERHEAD = round(0.8 * 2**30)
"""Bytes of main memory that Python and the libraries take, about (`benchmarks/memory.py` measures it)."""
CARD_OVERHEAD = 2**30
"""Bytes that a CUDA context and the libraries' workspaces take of a card, about."""
CARD_SHARE = 0.95
"""Of a card's memory that tensors can have; the rest is lost between them."""
_MOST_CHANGES = 16


@dataclass(frozen=True)
class StageWork:
    flops: Mapping[torch.dtype, float]
    """Operations of matrix products and convolutions by type, two per multiply-add."""
    bytes: float
    """That all other operations move."""


@dataclass(frozen=True)
class Reckoning:
    """Bytes of what stays, of what comes on top by stage, and at the peak; and the work of one update."""

    standing: dict[str, int]
    """By part, through the whole run."""
    activations: int
    """That the transformer's pass keeps for its backward, its logits among them."""
    working: dict[str, int]
    """By stage: the most it holds beside what was there when it began."""
    peak: int
    """The most at once; on the CPU what stays and the most of every stage, for they hardly share their memory there."""
    peak_stage: str
    work: dict[str, StageWork]
    """By stage, of one update."""

    def seconds(self, rates: "Rates") -> float:
        """Of one update: the matrix products, and then the traffic of all else."""
        products = sum(count / rates.flops[kind] for work in self.work.values() for kind, count in work.flops.items())
        return products + sum(work.bytes for work in self.work.values()) / rates.bytes

    @property
    def tflop(self) -> float:
        return sum(sum(work.flops.values()) for work in self.work.values()) / 1e12


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    flops: Mapping[torch.dtype, float]
    """Of matrix products, by type."""
    bytes: float
    """Read and written."""


@contextmanager
def _without_numbers(recipe: Recipe, *passed: type[Exception]) -> Iterator[None]:
    """Say in a VarpiError of a method that it cannot be reckoned. What an operation raises that needs numbers depends
    on the operation; errors that are `passed` on are no such ones."""
    try:
        yield
    except passed:
        raise
    except Exception as error:
        text = " ".join(f"{error}".split())
        raise VarpiError(
            f"--dry-run cannot reckon method {recipe.method.name}: a step of it needs numbers ({text:.150})"
        ) from error


def reckon(recipe: Recipe, *, cuda: bool = False) -> Reckoning:
    """The memory and the work of one update of a recipe in one process.

    cuda: whether attention and the optimizer's update are reckoned as they are made there: fused, all weights at once.

    Raises:
        VarpiError: the recipe's parts do not fit, a size is not known, or a step of its method needs numbers.
    """
    training, side = recipe.training, recipe.data.image_size
    micro = min(training.micro_batch or training.batch_size, training.batch_size)
    # A second micro-batch finds the gradients of the first; more are like it, unless their rollouts are kept.
    images = training.batch_size if training.updates_per_batch > 1 else min(training.batch_size, 2 * micro)
    batch = Batch(
        images=torch.empty(0),
        condition=torch.zeros(images, dtype=torch.int64),
        positions=torch.arange(images),
        indices=torch.arange(images),
        bad=0,
    )
    with torch.random.fork_rng(), without_weights(), _without_numbers(recipe, VarpiError):
        method = build_method(_bare(recipe), _classes(recipe), "meta")
    with Ledger() as ledger, as_on_a_card() if cuda else nullcontext():
        enter(part for part in vars(method).values() if isinstance(part, torch.nn.Module))
        method.device = "cpu"  # pyright: ignore[reportAttributeAccessIssue]
        standing = _weights(method, ledger.live)
        optimizer = make_optimizer(method.model, recipe.optimizer)
        if cuda:
            for group in optimizer.param_groups:
                group["foreach"] = True
        standing["optimizer state"] = ledger.live - sum(standing.values())
        average = Average(method.model, training.ema) if training.ema is not None else None
        standing["average of the weights"] = ledger.live - sum(standing.values())
        standing["gradients"] = sum(p.nbytes for p in method.model.parameters() if p.requires_grad)
        pixels = torch.empty(training.batch_size, 3, side, side)
        standing["images of a batch"] = pixels.nbytes
        batch = dataclasses.replace(batch, images=pixels[:images], condition=_condition(method, images))
        method.stages = LedgerStages(ledger)
        ledger.forget()
        trainer = Trainer(recipe, method, optimizer, World(0, 1, "cpu"), average)
        with _without_numbers(recipe):
            for _ in trainer.updates(batch, 0, Progress()):
                pass
    stages = {name: stage for name, stage in ledger.stages.items() if stage.top}
    whole = training.batch_size / images
    standing = {name: size for name, size in standing.items() if size}
    working = {name: stage.added for name, stage in stages.items() if stage.added}
    if training.save_in_background and not cuda:  # elsewhere the copy is in main memory
        changing = ("trained weights", "optimizer state", "average of the weights")
        working["checkpoint"] = sum(standing.get(name, 0) for name in changing)
    # A process on the CPU keeps what it frees, in pieces that stages of other sizes seldom find room in.
    kept = 0 if cuda else sum(standing.values()) + sum(working.values())
    return Reckoning(
        standing=standing,
        activations=stages["transformer"].kept if "transformer" in stages else 0,
        working=working,
        peak=max(ledger.peak, kept),
        peak_stage=max(stages, key=lambda name: stages[name].top),
        work={name: _work(stage, 1 if name == "optimizer" else whole) for name, stage in stages.items()},
    )


def _work(stage: Stage, times: float) -> StageWork:
    return StageWork({kind: count * times for kind, count in stage.flops.items()}, stage.bytes * times)


def measure_rates(device: str, kinds: Iterable[torch.dtype], seconds: float = 10.0) -> Rates:
    """What this device does, measured for about so many seconds in all: square products of each type, and copies.

    Of each the best of many, for other work slows a try and nothing speeds it up.
    """
    kinds = list(kinds)
    each = seconds / (len(kinds) + 1)
    width = 8192 if device.startswith("cuda") else 1024
    flops = {}
    for kind in kinds:
        one, other = (torch.randn(width, width, device=device).to(kind) for _ in range(2))
        flops[kind] = 2 * width**3 / _best(lambda one=one, other=other: one @ other, device, each)
    one, other = (torch.zeros(2**28 if device.startswith("cuda") else 2**25, device=device) for _ in range(2))
    return Rates(flops, 2 * one.nbytes / _best(lambda: one.copy_(other), device, each))


def _best(work: Callable[[], object], device: str, seconds: float) -> float:
    """The shortest time of a call, of all that are made in so many seconds, after one that does not count."""
    begun, best = time.perf_counter(), float("inf")
    work()
    while time.perf_counter() < begun + seconds or best == float("inf"):
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        before = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return best


@dataclass(frozen=True)
class Room:
    """What a device has for tensors."""

    where: str
    size: int
    """Bytes of its memory."""
    tensors: int
    """Bytes of it that tensors can have."""
    cuda: bool


def room_of(device: str, given: float | None = None) -> Room:
    """Of this device, or of a card of `given` GiB."""
    if given is not None:
        return _card(f"a card of {given:g} GiB", round(given * 2**30))
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return _card(properties.name, properties.total_memory)
    size = physical_memory()
    if size is None:
        raise VarpiError("--dry-run: this system does not tell how much memory it has; give --device-memory")
    return Room("this machine", size, size - PROCESS_OVERHEAD, False)


def _card(where: str, size: int) -> Room:
    return Room(where, size, int(size * CARD_SHARE) - CARD_OVERHEAD, True)


def what_fits(recipe: Recipe, room: Room) -> list[str]:
    """Settings with which a recipe fits into a device's memory; none when nothing does.

    The largest part is made smaller until the whole fits, each time reckoned anew.
    """
    chosen: dict[str, object] = {}
    found = reckon(recipe, cuda=room.cuda)
    for _ in range(_MOST_CHANGES):
        if found.peak <= room.tensors:
            return [f"{key}={value}" for key, value in chosen.items()]
        for change in _changes(recipe, found):
            values = yaml.safe_load(recipe.to_yaml())
            for key, value in change.items():
                apply_setting(values, f"{key}={value}")
            try:
                changed = parse_recipe(values)
                found = reckon(changed, cuda=room.cuda)
            except VarpiError:  # this recipe cannot have it, or a library is missing
                continue
            recipe, chosen = changed, chosen | change
            break
        else:
            return []
    return []


def _changes(recipe: Recipe, found: Reckoning) -> Iterator[dict[str, object]]:
    """What would make a recipe smaller, beginning with its largest part."""
    training, reward = recipe.training, getattr(recipe.method, "reward", None)
    micro = min(training.micro_batch or training.batch_size, training.batch_size)
    trains_generator = recipe.generator is not None and recipe.method.trains == "generator"

    def of_weights() -> Iterator[dict[str, object]]:
        if recipe.optimizer.state_precision == "fp32":
            yield {"optimizer.state_precision": "bf16"}
        if trains_generator and recipe.lora is None and recipe.generator and recipe.generator.source is not None:
            yield {"lora.rank": 16}

    def of_activations() -> Iterator[dict[str, object]]:
        if trains_generator and not training.gradient_checkpointing:
            yield {"training.gradient_checkpointing": "true"}
        if micro > 1:
            yield {"training.micro_batch": micro // 2}

    def of_reward() -> Iterator[dict[str, object]]:
        if (chunk := getattr(reward, "decode_batch", 1)) > 1:
            yield {"method.reward.decode_batch": chunk // 2}

    sizes = {
        of_weights: sum(found.standing.values()),
        of_activations: max(found.activations, found.working.get("backward", 0)),
        of_reward: found.working.get("reward", 0) if found.peak_stage == "reward" else 0,
    }
    for changes in sorted(sizes, key=lambda part: -sizes[part]):
        yield from changes()


def _bare(recipe: Recipe) -> Recipe:
    """Without what reads files that a step does not need."""
    if recipe.generator is not None and recipe.generator.text_encoder is not None:
        raise VarpiError("--dry-run reckons with caption features; leave out generator.text_encoder")
    if getattr(recipe.method, "token_cache", None) is not None:
        return recipe.model_copy(update={"method": recipe.method.model_copy(update={"token_cache": None})})
    return recipe


def _classes(recipe: Recipe) -> int | None:
    """What the data must have for the recipe's generator to take it."""
    if recipe.generator is None:
        return getattr(recipe.method, "num_classes", None)
    return None if open_generator(recipe, "meta").num_classes is None else 1


def _weights(method: Method, live: int) -> dict[str, int]:
    """Bytes of the models by part."""
    trained = sum(p.nbytes for p in method.model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in method.model.parameters() if not p.requires_grad)
    reference = getattr(method, "reference", None)
    reference = 0 if reference is None else sum(p.nbytes for p in reference.parameters())
    tokenizer = getattr(method, "tokenizer", None)
    mine = {id(parameter) for parameter in method.model.parameters()}
    others = [] if tokenizer is None else [p for p in tokenizer.parameters() if id(p) not in mine]
    parts = {
        "trained weights": trained,
        "frozen weights": frozen,
        "reference copy": reference,
        "tokenizer": sum(p.nbytes for p in others),
    }
    return {**parts, "other networks and tables": live - sum(parts.values())}


def _condition(method: Method, images: int) -> Any:
    """A condition of the kind that the method's generator takes."""
    generator = generator_of(method)
    if generator is None or generator.num_classes is not None:
        return torch.zeros(images, dtype=torch.int64)
    if generator.caption_features is not None:
        tokens, width = generator.caption_features
        return generator.prepare_condition([torch.zeros(tokens, width)] * images)
    return generator.prepare_condition([[0] * PROMPT] * images)
