"""What `varpi train --dry-run` says: the memory of a recipe by part, the time of a step, and whether it fits."""

import torch

from varpi.errors import VarpiError
from varpi.recipe import Recipe
from varpi.runtime.processes import choose_device
from varpi.training.logging import duration
from varpi.training.reckoning import Reckoning, Room, measure_rates, reckon, room_of, what_fits

STAGES = {
    "encode": "encoding the images",
    "transformer": "transformer, forward",
    "sample": "drawing samples",
    "reward": "decoder and reward, a chunk at a time",
    "loss": "log-probabilities and loss",
    "backward": "backward",
    "optimizer": "the optimizer's update",
    "tokenizer": "tokenizer, forward",
    "perceptual": "perceptual network",
    "between": "all else",
    "checkpoint": "the copy that a checkpoint is written from",
}


def dry_run(recipe: Recipe, device: str | None = None, device_memory: float | None = None) -> list[str]:
    """The lines. device_memory: GiB of a card to reckon for, which is not here and whose rates are not known.

    Raises:
        VarpiError: the recipe does not fit, with the settings that would; or cannot be reckoned.
    """
    device = choose_device(device)
    room = room_of(device, device_memory)
    found = reckon(recipe, cuda=room.cuda)
    lines = _memory(recipe, found, room)
    if found.peak > room.tensors:
        settings = what_fits(recipe, room)
        advice = " ".join(f"--set {setting}" for setting in settings)
        raise VarpiError(
            *lines,
            f"does not fit: {_gib(found.peak)} GiB are needed, {room.where} has {_gib(room.tensors)} for tensors; "
            + (f"it would with {advice}" if settings else "no setting that varpi knows makes it fit"),
        )
    return [*lines, *_time(recipe, found, device, measured=device_memory is None)]


def _memory(recipe: Recipe, found: Reckoning, room: Room) -> list[str]:
    training = recipe.training
    micro = min(training.micro_batch or training.batch_size, training.batch_size)
    lines = [
        f"{recipe.method.name}: {training.batch_size} images of {recipe.data.image_size} pixels a step, {micro} at a "
        f"time, {training.precision}; reckoned, in GiB",
        *(_row(name, size) for name, size in found.standing.items()),
        _row("these together", sum(found.standing.values())),
        "on top, at most, while it runs:",
        *(_row(f"  {STAGES.get(name, name)}", size) for name, size in found.working.items()),
    ]
    if found.activations:
        kept = "activations that the forward pass keeps"
        lines.append(_row(f"  {kept}{', recomputed' if training.gradient_checkpointing else ''}", found.activations))
        if (other := _other_way(recipe, room)) is not None:
            without = training.gradient_checkpointing
            lines.append(_row(f"  {kept} {'without' if without else 'with'} gradient_checkpointing", other))
    most = STAGES.get(found.peak_stage, found.peak_stage) if room.cuda else "all of it, for freed memory is kept"
    lines.append(_row(f"at the peak ({most})", found.peak))
    return [*lines, _row(f"there is for tensors on {room.where}, of {_gib(room.size)}", room.tensors)]


def _other_way(recipe: Recipe, room: Room) -> int | None:
    """The activations with gradient checkpointing where it is off, and without where it is on."""
    if recipe.generator is None or recipe.method.trains != "generator":
        return None
    turned = {"gradient_checkpointing": not recipe.training.gradient_checkpointing}
    training = recipe.training.model_copy(update=turned)
    return reckon(recipe.model_copy(update={"training": training}), cuda=room.cuda).activations


def _time(recipe: Recipe, found: Reckoning, device: str, *, measured: bool) -> list[str]:
    moved = sum(work.bytes for work in found.work.values()) / 1e12
    lines = [f"work of a step: {found.tflop:.3g} TFLOP of products, {moved:.3g} TB moved by all else"]
    if not measured:
        return lines
    kinds = {kind for work in found.work.values() for kind in work.flops}
    rates = measure_rates(device, kinds)
    step = found.seconds(rates)
    each = ", ".join(f"{rates.flops[kind] / 1e12:.3g} TFLOP/s in {_name(kind)}" for kind in sorted(kinds, key=str))
    return [
        *lines,
        f"measured here: {each}, {rates.bytes / 1e9:.3g} GB/s",
        f"at these rates: {step:.3g} s a step, {duration(step * recipe.training.steps)} for {recipe.training.steps}; "
        "reading data, validation and checkpoints not counted",
    ]


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _row(name: str, size: int) -> str:
    return f"{_gib(size):>10}  {name}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}" if size < 2**30 * 100 else f"{size / 2**30:.0f}"
