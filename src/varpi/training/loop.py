"""The training loop: batches in, updates out, whatever the method.

Every random draw is a function of the recipe's seed and the step, and of the image's place in the global batch, so the
number of processes and the micro-batch size change no number but rounding. Dropout's masks alone are keyed by process
and micro-batch instead, as they are drawn inside the network. A resume changes nothing at all.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from varpi.data import BadImage, Batch, Dataset, Dropped, Item
from varpi.data.loader import collate_conditions
from varpi.data.opening import open_batches, open_split
from varpi.errors import VarpiError
from varpi.generators import Generator
from varpi.methods import Method, build_method
from varpi.recipe import Optimizer, Recipe, read_yaml
from varpi.runtime.files import write_text
from varpi.runtime.processes import World, join_world, leave_world
from varpi.training.logging import Logger, Metrics, peak_memory
from varpi.training.sharding import gradient_norm, shard
from varpi.training.state import (
    Progress,
    checkpoints,
    full_weights,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)

# What a resumed run may do differently without being another run.
FREE_TO_CHANGE = {
    "data.workers",
    "data.max_bad_fraction",
    "training.save_every",
    "training.keep",
    "training.max_skipped",
}


def train(
    recipe: Recipe, output: str | Path, *, resume: bool = False, device: str | None = None, show: bool = True
) -> Path:
    """Carry out a recipe in the directory `output`; returns it.

    Writes recipe.yaml, metrics.jsonl, checkpoints/ and model.safetensors (with `validation`, the best one so far).
    `resume` continues from the newest checkpoint, or begins when there is none. SIGTERM and SIGINT save and return.

    Raises VarpiError for whatever can be refused, before any file is written.
    """
    world = join_world(device)
    run = Path(output)
    try:
        with _deterministic():
            return _train(recipe, run, world, resume, show)
    finally:
        leave_world()


def _train(recipe: Recipe, run: Path, world: World, resume: bool, show: bool) -> Path:
    training = recipe.training
    if training.batch_size % world.size:
        raise VarpiError(
            f"training.batch_size is {training.batch_size}; it must be a multiple of {world.size} processes"
        )
    _check_output(run, recipe, resume)
    batches = open_batches(recipe, world)
    held_out = None if recipe.validation is None else open_split(recipe.data, recipe.validation.split)
    method = build_method(recipe, batches.num_classes, world.device)
    for model in (method.model, *method.frozen):
        shard(model, world, training.precision)
    optimizer = make_optimizer(method.model, recipe.optimizer)
    progress = Progress()
    checkpoint = newest_whole(run, _warn) if resume else None
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, method.model, optimizer, world)
    _check_data(run, batches.fingerprint, world)
    if world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "recipe.yaml", recipe.to_yaml())
        write_text(run / "data.json", json.dumps({"fingerprint": batches.fingerprint}))
    world.barrier()

    batches.seen, batches.bad, batches.dropped = _share(progress, world)
    logger = _logger(run, recipe, progress, world, show)
    with logger, _stop_signal() as stop:
        trainer = Trainer(recipe, method, optimizer, world)
        cursor = batches.cursor_at(progress.step // training.updates_per_batch, progress.cursors)
        stream = batches.from_cursor(cursor)
        finished = progress.step >= training.steps or _out_of_patience(recipe, progress)
        saved = progress.step
        while not finished:
            begun = time.perf_counter()
            batch_number = progress.step // training.updates_per_batch
            batch = next(stream)
            cursor = batch.cursor
            for metrics in trainer.updates(batch, batch_number, progress):
                metrics["seconds"] = (now := time.perf_counter()) - begun
                progress.seconds += metrics["seconds"]
                begun = now
                if method_tokens := _tokens_per_image(method):
                    metrics["tokens_per_second"] = training.batch_size * method_tokens / metrics["seconds"]
                logger.log(progress.step, metrics)
            opened = world.sum([float(batches.seen), float(batches.bad), float(batches.dropped)])
            progress.images_opened, progress.bad_images, progress.dropped_images = map(int, opened)

            finished = progress.step >= training.steps
            validation = recipe.validation
            if validation is not None and (progress.step % validation.every == 0 or finished):
                assert held_out is not None
                finished |= _validate(run, recipe, method, held_out, progress, world, logger)
            stopping = bool(world.max(float(stop.is_set())))
            due = training.save_every is not None and progress.step % training.save_every == 0
            if due or finished or stopping:
                progress.cursors = world.gather(cursor)
                save_checkpoint(run, method.model, optimizer, progress, world, training.keep)
                saved = progress.step
            if stopping and not finished:
                logger.say(f"stopped at step {saved} of {training.steps}, saved; continue with --resume")
                return run
        if recipe.validation is None:
            _save_model(run, recipe, method, progress, world)
        if progress.dropped_images:
            logger.say(
                f"left out {progress.dropped_images} of {progress.images_opened} images: no caption, or too small"
            )
    return run


class Trainer:
    """Makes optimizer updates of batches."""

    def __init__(self, recipe: Recipe, method: Method, optimizer: torch.optim.Optimizer, world: World) -> None:
        self.recipe = recipe
        self.method = method
        self.optimizer = optimizer
        self.world = world
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._begun = False

    def updates(self, batch: Batch, number: int, progress: Progress) -> Iterator[Metrics]:
        """`updates_per_batch` updates from batch `number` of the run; yields the metrics of each."""
        micro_batches = self._split(batch)
        rollouts: list[Any] = [None] * len(micro_batches)
        for _ in range(self.recipe.training.updates_per_batch):
            totals: dict[str, Tensor] = {}
            self.optimizer.zero_grad()
            for i, micro in enumerate(micro_batches):
                self._seed_dropout(progress.step, i)
                outcome = self.method.loss(micro, number, rollouts[i])
                rollouts[i] = outcome.rollout
                share = len(micro.images) / len(batch.images)
                with self.method.stages("backward"):
                    (outcome.loss * share).backward()
                for name, value in {"loss": outcome.loss.detach(), **outcome.metrics}.items():
                    totals[name] = totals.get(name, 0) + value.double() * share
            with self.method.stages("optimizer"):
                norm = gradient_norm(self.parameters, self.recipe.optimizer.gradient_clip)
                metrics = self._mean(totals) | {"gradient_norm": norm.item()}
                self._step(metrics, progress)
            metrics |= {f"seconds_{name}": value for name, value in self.method.stages.take().items()}
            metrics["peak_memory_gib"] = self.world.max(peak_memory(self.world.device))
            yield metrics

    def _step(self, metrics: Metrics, progress: Progress) -> None:
        """Update the weights, or skip the update when it would poison them."""
        rate = learning_rate(self.recipe.optimizer, progress.step, self.recipe.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics["learning_rate"] = rate
        progress.step += 1
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"]):
            self.optimizer.step()
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            limit = self.recipe.training.max_skipped
            if progress.skipped_in_a_row >= limit:
                wrong = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
                raise VarpiError(
                    f"step {progress.step}: {limit} updates in a row had a non-finite loss or gradient ({wrong}) and "
                    "were skipped; lower optimizer.learning_rate, try training.precision: fp32, or check the images"
                )
        metrics["skipped"] = float(progress.skipped)

    def _split(self, batch: Batch) -> list[Batch]:
        size = self.recipe.training.micro_batch or len(batch.images)
        condition = _condition(self.method, batch.condition)
        return [
            dataclasses.replace(
                batch,
                images=batch.images[i : i + size].to(self.world.device, non_blocking=True),
                condition=condition[i : i + size].to(self.world.device),
                positions=batch.positions[i : i + size],
            )
            for i in range(0, len(batch.images), size)
        ]

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        key = f"{self.recipe.seed} {step} {self.world.rank} {micro_batch}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))

    def _mean(self, totals: dict[str, Tensor]) -> Metrics:
        values = self.world.sum([float(value) for value in totals.values()])
        return {name: value / self.world.size for name, value in zip(totals, values, strict=True)}


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings but neither norms nor biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )
    # Not left to the first step: a checkpoint may come before it, when the first updates are skipped.
    for p in parameters:
        moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The rate of update number `step` (from 0) of `steps`."""
    rate = settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "cosine" and step >= settings.warmup_steps:
        done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
    return rate


def _validate(
    run: Path, recipe: Recipe, method: Method, held_out: Dataset, progress: Progress, world: World, logger: Any
) -> bool:
    """Log the held-out loss and keep the best weights; true when patience has run out."""
    settings = recipe.validation
    assert settings is not None
    count = min(settings.images or len(held_out), len(held_out))
    size = recipe.training.micro_batch or recipe.training.batch_size
    total, images = 0.0, 0.0
    rounds = -(-count // (size * world.size))  # the same number on every process: sharded models work in step
    filler = _first_readable(held_out)
    with torch.no_grad():
        for i in range(rounds):
            first = (i * world.size + world.rank) * size
            items = _readable(held_out, range(first, min(first + size, count)))
            read = len(items)
            if not items:  # sharded models need every process in every pass
                items = [filler]
            filler = items[0]
            batch = Batch(
                images=torch.stack([item.image for item in items]).to(world.device),
                condition=_condition(method, collate_conditions([item.condition for item in items])).to(world.device),
                positions=torch.arange(len(items)),
                indices=torch.arange(len(items)),
                bad=0,
            )
            loss = float(method.validation_loss(batch))
            if read:
                total, images = total + loss * read, images + read
    total, images = world.sum([total, images])
    loss = total / images
    method.stages.take()
    progress.validations_since_best += 1
    if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
        progress.best_loss, progress.best_step, progress.validations_since_best = loss, progress.step, 0
        _save_model(run, recipe, method, progress, world)
    logger.log(progress.step, {"validation_loss": loss})
    return _out_of_patience(recipe, progress)


def _out_of_patience(recipe: Recipe, progress: Progress) -> bool:
    patience = recipe.validation.patience if recipe.validation is not None else None
    return patience is not None and progress.validations_since_best >= patience


def _condition(method: Method, condition: Any) -> Any:
    """What data gives, in the form that the trained model takes."""
    return method.model.prepare_condition(condition) if isinstance(method.model, Generator) else condition


def _readable(dataset: Dataset, indices: range) -> list[Item]:
    """The items that can be used; each of the others gets a warning."""
    items = []
    for index in indices:
        try:
            items.append(dataset[index])
        except (BadImage, Dropped) as error:
            _warn(f"validation leaves out an image: {error}")
    return items


def _first_readable(dataset: Dataset) -> Item:
    for index in range(len(dataset)):
        with suppress(BadImage, Dropped):
            return dataset[index]
    raise VarpiError(f"validation: none of the {len(dataset)} held-out images could be read")


def _save_model(run: Path, recipe: Recipe, method: Method, progress: Progress, world: World) -> None:
    weights = full_weights(method.model)
    if world.is_main:
        extra = {"recipe": recipe.to_yaml(), "step": str(progress.step)}
        method.save(run / "model.safetensors", weights, extra)
    world.barrier()


def _check_output(run: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse a directory that holds something else."""
    if run.exists() and not run.is_dir():
        raise VarpiError(f"{run} is a file; choose another --output")
    if not run.is_dir() or all(entry.name.startswith(".") for entry in run.iterdir()):
        return
    if not (run / "recipe.yaml").is_file():
        raise VarpiError(f"{run} is not empty and holds no run; choose another --output")
    if not resume:
        newest = checkpoints(run)
        state = f"at {newest[0].name}" if newest else "without a checkpoint"
        raise VarpiError(f"{run} already holds a run ({state}); continue it with --resume or choose another --output")
    before = _flatten(read_yaml(run / "recipe.yaml"))
    now = _flatten(yaml.safe_load(recipe.to_yaml()))
    free = FREE_TO_CHANGE | ({"training.steps"} if recipe.optimizer.schedule == "constant" else set())
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in free and not key.startswith("logging."):
            raise VarpiError(
                f"{run} is a run of another recipe: {key} is {before.get(key)!r} there and {now.get(key)!r} here; "
                "choose another --output"
            )


def _check_data(run: Path, fingerprint: str, world: World) -> None:
    path = run / "data.json"
    if path.is_file() and json.loads(path.read_text())["fingerprint"] != fingerprint:
        raise VarpiError(f"{run} was trained on other data than the source now holds; choose another --output")
    world.barrier()


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    items = (_flatten(value, f"{prefix}.{key}" if prefix else key) for key, value in values.items())
    return dict(itertools.chain.from_iterable(item.items() for item in items))


def _share(progress: Progress, world: World) -> tuple[int, int, int]:
    """This process's part of the images counted before a resume: opened, unreadable, left out."""
    counts = progress.images_opened, progress.bad_images, progress.dropped_images
    opened, bad, dropped = (count // world.size + (world.rank < count % world.size) for count in counts)
    return opened, bad, dropped


def _tokens_per_image(method: Method) -> int:
    return method.model.num_tokens if isinstance(method.model, Generator) else 0


def _logger(run: Path, recipe: Recipe, progress: Progress, world: World, show: bool) -> Any:
    if world.is_main:
        return Logger(run, recipe.logging, recipe.training.steps, progress.step, show=show)
    return _Silent()


class _Silent:
    """What other processes log to."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def say(self, message: str) -> None:
        pass


def _warn(message: str) -> None:
    logging.getLogger("varpi").warning(message)


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets; a second SIGINT interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Leave the caller's random state as it was."""
    with torch.random.fork_rng():
        yield
