"""The training loop: batches in, updates out, whatever the method.

Every random draw is a function of the recipe's seed and the step, and of the image's place in the global batch, so the
number of processes and the micro-batch size change no number but rounding. Dropout's masks are keyed by process and
micro-batch instead, as they are drawn inside the network, and two methods that make tokenizers and judges take means
among the images of a pass (`training.micro_batch` names them). A resume changes nothing at all.
"""

import dataclasses
import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varpi.data import Batch
from varpi.data.left_out import LeftOut
from varpi.data.opening import AnyBatches, open_batches
from varpi.errors import Stopped, VarpiError
from varpi.generators import Generator
from varpi.methods import Method, build_method, generator_of
from varpi.recipe import Recipe
from varpi.runtime.memory import check_memory
from varpi.runtime.processes import World, joined_world, stop_request
from varpi.training.average import Average
from varpi.training.banner import banner
from varpi.training.compiling import compile_blocks
from varpi.training.logging import Logger, Metrics, Silence, check_sinks, open_logger, peak_memory
from varpi.training.optimizer import learning_rate, make_optimizer
from varpi.training.preview import Previewer
from varpi.training.run_directory import (
    RunLock,
    check_data,
    check_run,
    is_finished,
    is_over,
    is_run,
    keeps_best,
    write_origin,
)
from varpi.training.sharding import exchange_gradients, gradient_norm, part_held, shard
from varpi.training.state import (
    CheckpointWriter,
    Progress,
    full_weights,
    load_checkpoint,
    newest_whole,
)
from varpi.training.trouble import EqualRewards, explained
from varpi.training.validation import Validator, caption_check, prepare_condition
from varpi.weights.class_names import known_class_names, name_classes

Watch = Callable[[Path, bool], object]
"""Told of a run's directory, and whether the run is over."""


def train(
    recipe: Recipe,
    output: str | Path,
    *,
    resume: bool = False,
    device: str | None = None,
    show: bool = True,
    watch: Watch | None = None,
) -> Path:
    """Carry out a recipe in the directory `output`; returns it.

    Writes recipe.yaml, metrics.jsonl, checkpoints/ and model.safetensors (where `validation` says
    what is best, the best one so far).
    `resume` continues from the newest checkpoint, or begins when there is none; a finished run it leaves as it is.
    `watch` is called in the main process with the directory and whether the run is over: when it begins, after
    previews, validations and checkpoints, and at its end.

    Raises:
        VarpiError: whatever can be refused, before any file is written; or the run cannot go on.
        Stopped: SIGTERM or SIGINT came, and the run has saved where it stood.
    """
    run = Path(output)
    own_draws = torch.random.fork_rng(range(torch.cuda.device_count()))  # the caller's stay as they are
    with own_draws, joined_world(device) as world, RunLock(run) as lock:
        stopped = _train(recipe, run, world, lock, resume, show, watch if world.is_main else None)
    if stopped is not None:
        raise stopped
    return run


def _train(
    recipe: Recipe, run: Path, world: World, lock: RunLock, resume: bool, show: bool, watch: Watch | None = None
) -> Stopped | None:
    """Put together what the recipe names, and train."""
    training = recipe.training
    if training.batch_size % world.size:
        raise VarpiError(
            f"training.batch_size is {training.batch_size}; it must be a multiple of {world.size} processes"
        )
    share, side = training.batch_size // world.size, recipe.data.image_size
    check_memory(share * 3 * side**2 * 4, f"{share} images of {side} pixels at once (training.batch_size)")
    if world.on_main(lambda: _enter(run, recipe, lock, resume)):
        if show and world.is_main:
            print(f"{run} is finished; nothing was left to do", file=sys.stderr)
        return None
    batches = open_batches(recipe, world, known_class_names(recipe))
    validation = Validator(recipe, world, batches) if recipe.validation is not None else None
    preview = Previewer(recipe, world, batches) if recipe.preview is not None else None
    method = build_method(recipe, batches.num_classes, world.device)
    batches.check_captions(caption_check(method))
    if (generator := generator_of(method)) is not None:
        name_classes(generator, recipe, batches)
    for model in (method.model, *method.frozen):
        shard(model, world, training.shard_over)
        if training.compile:
            compile_blocks(model, world.device)
    part = part_held(world, training.shard_over)
    optimizer = make_optimizer(method.model, recipe.optimizer, seed=recipe.seed, part=part)
    average = Average(method.model, training.ema) if training.ema is not None else None
    checkpoint = world.on_main(lambda: _claim(run, recipe, batches.fingerprint, lock, resume))
    progress = Progress()
    if checkpoint is not None:
        progress = load_checkpoint(checkpoint, method.model, optimizer, world, average)
    world.on_main(lambda: write_origin(run, recipe, batches.fingerprint))
    batches.seen, batches.left_out = _share(progress, world)
    logger = open_logger(run, recipe.logging, training.steps, progress.step, world, show=show)
    with logger, explained(run, progress):
        for line in banner(run, recipe, method, batches, world, progress.step):
            logger.say(line)
        trainer = Trainer(recipe, method, optimizer, world, average)
        return _loop(run, trainer, batches, validation, preview, progress, logger, watch or (lambda run, over: None))


def _loop(
    run: Path,
    trainer: "Trainer",
    batches: AnyBatches,
    validation: Validator | None,
    preview: Previewer | None,
    progress: Progress,
    logger: Logger | Silence,
    watch: Watch,
) -> Stopped | None:
    """From where `progress` stands to the last step, or to a signal."""
    recipe, method, world = trainer.recipe, trainer.method, trainer.world
    training, equal_rewards = recipe.training, EqualRewards()
    cursor: Any = batches.cursor_at(progress.step // training.updates_per_batch, progress.cursors)
    stream = batches.from_cursor(cursor)
    finished = is_over(recipe, progress)

    def show() -> None:
        assert preview is not None
        with trainer.weights_to_give():
            logger.log(progress.step, preview.show(method, run, progress.step, logger))

    if preview is not None and not progress.step:
        show()
    watch(run, finished)
    writer = CheckpointWriter(run, world, training.keep, background=training.save_in_background)
    with stop_request() as stop, closing(stream), closing(writer):
        while not finished:
            begun = time.perf_counter()
            batch = next(stream)
            cursor = batch.cursor
            for metrics in trainer.updates(batch, progress.step // training.updates_per_batch, progress):
                metrics["seconds"] = (now := time.perf_counter()) - begun
                progress.seconds += metrics["seconds"]
                begun = now
                if isinstance(method.model, Generator):
                    tokens = training.batch_size * method.model.num_tokens
                    metrics["tokens_per_second"] = tokens / metrics["seconds"]
                logger.log(progress.step, metrics)
                if world.is_main:
                    equal_rewards.see(progress.step, metrics)

            seen = False
            if validation is not None and (progress.step % validation.every == 0 or is_over(recipe, progress)):
                with trainer.weights_to_give():
                    found = validation.measure(method)
                if validation.note(progress, found):
                    _save_model(run, trainer, progress)
                logger.log(progress.step, {f"validation_{name}": value for name, value in found.items()})
                seen = True
            finished = is_over(recipe, progress)
            if preview is not None and (progress.step % preview.every == 0 or finished):
                show()
                seen = True
            stopping = int(world.max(stop.signal))
            due = training.save_every is not None and progress.step % training.save_every == 0
            if due or finished or stopping:
                every = world.gather(cursor if isinstance(cursor, tuple) else (cursor,))
                progress.cursors = [place for own in every for place in own]
                progress.images_opened = sum(world.gather(batches.seen))
                progress.left_out = LeftOut(*world.gather(batches.left_out.found)).found
                writer.save(method.model, trainer.optimizer, progress, trainer.average)
                if finished or stopping:
                    writer.finish()
                seen = True
            if seen:
                watch(run, finished or stopping > 0)
            if (stopping or finished) and world.is_main:
                LeftOut(progress.left_out).say(recipe.data.source, progress.images_opened, "images")
            if stopping and not finished:
                where = f"step {progress.step} of {training.steps}"
                return Stopped(stopping, f"stopped at {where}, saved in {run}; continue with --resume")
    if not keeps_best(recipe):
        _save_model(run, trainer, progress)
    return None


class Trainer:
    """Makes optimizer updates of batches."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        optimizer: torch.optim.Optimizer,
        world: World,
        average: Average | None = None,
    ) -> None:
        self.average = average
        self.recipe = recipe
        self.method = method
        self.optimizer = optimizer
        self.world = world
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._begun = False

    def weights_to_give(self) -> AbstractContextManager[None]:
        """Within this block the model has the weights that the run gives back: their average, where there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

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
                exchange_gradients(self.method.model, i == len(micro_batches) - 1)
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
            if self.average is not None:
                self.average.update()
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            limit = self.recipe.training.max_skipped
            if progress.skipped_in_a_row >= limit:
                wrong = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
                raise FloatingPointError(
                    f"step {progress.step}: {limit} updates in a row had a non-finite loss or gradient ({wrong}) and "
                    "were skipped; lower optimizer.learning_rate, try training.precision: fp32, or check the images"
                )
        metrics["skipped"] = float(progress.skipped)

    def _split(self, batch: Batch) -> list[Batch]:
        size = self.recipe.training.micro_batch or len(batch.images)
        condition = prepare_condition(self.method, batch.condition, self.world.device)
        captions = [given for given in batch.condition if isinstance(given, str)] or None
        return [
            dataclasses.replace(
                batch,
                images=batch.images[i : i + size].to(self.world.device, non_blocking=True),
                condition=condition[i : i + size],
                captions=None if captions is None else captions[i : i + size],
                positions=batch.positions[i : i + size],
                indices=batch.indices[i : i + size],
            )
            for i in range(0, len(batch.images), size)
        ]

    def _seed_dropout(self, step: int, micro_batch: int) -> None:
        key = f"{self.recipe.seed} {step} {self.world.rank} {micro_batch}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7]))

    def _mean(self, totals: dict[str, Tensor]) -> Metrics:
        values = self.world.sum([float(value) for value in totals.values()])
        return {name: value / self.world.size for name, value in zip(totals, values, strict=True)}


def _enter(run: Path, recipe: Recipe, lock: RunLock, resume: bool) -> bool:
    """Refuse what can be refused at once, and keep others out of a run that is there; whether it is finished."""
    check_run(run, recipe, resume)
    check_sinks(recipe.logging)
    if is_run(run):
        lock.take()
    return resume and is_finished(run, recipe)


def _claim(run: Path, recipe: Recipe, fingerprint: str, lock: RunLock, resume: bool) -> Path | None:
    """Take possession of the directory; the checkpoint to continue from."""
    if not lock.taken:
        lock.take()
        check_run(run, recipe, resume)  # another run may have begun there meanwhile
    check_data(run, fingerprint)
    return newest_whole(run, logging.getLogger("varpi").warning) if resume else None


def _save_model(run: Path, trainer: "Trainer", progress: Progress) -> None:
    with trainer.weights_to_give():
        weights = full_weights(trainer.method.model)
        if trainer.world.is_main:
            extra = {"recipe": trainer.recipe.to_yaml(), "step": str(progress.step)}
            trainer.method.save(run / "model.safetensors", weights, extra)
    trainer.world.barrier()


def _share(progress: Progress, world: World) -> tuple[int, LeftOut]:
    """This process's part of what was counted before a resume: images opened, and those left out."""

    def part(count: int) -> int:
        return count // world.size + (world.rank < count % world.size)

    parts = {reason: (part(count), example) for reason, (count, example) in progress.left_out.items()}
    return part(progress.images_opened), LeftOut({reason: found for reason, found in parts.items() if found[0]})
