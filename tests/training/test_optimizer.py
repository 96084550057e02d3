"""Updates against AdamW written out by hand, and what the trainer seeds."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from varpi.data import Batch
from varpi.methods import Outcome
from varpi.recipe import Optimizer
from varpi.runtime.processes import World
from varpi.runtime.stages import Stages
from varpi.training.loop import Trainer
from varpi.training.optimizer import _rounded, learning_rate, make_optimizer
from varpi.training.state import Progress

GRADIENTS = [(3.0, 4.0), (0.3, -0.4), (-1.0, 0.0)]
"""Of a weight that is decayed and of a bias that is not, step by step."""


class Linear:
    """A method of known gradients."""

    def __init__(self, gradients: Sequence[tuple[float, float]] = GRADIENTS) -> None:
        self.gradients = gradients
        self.model: Any = nn.Linear(1, 1)
        nn.init.constant_(self.model.weight, 2.0)
        nn.init.constant_(self.model.bias, -1.0)
        self.frozen: tuple[nn.Module, ...] = ()
        self.stages = Stages()

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        of_weight, of_bias = self.gradients[step]
        return Outcome((self.model.weight * of_weight + self.model.bias * of_bias).sum(), {})

    def validation_loss(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def save(self, path: Any, state_dict: Any, extra: Any) -> None:
        raise NotImplementedError


def recipe_of(optimizer: Optimizer, **training: Any) -> Any:
    settings = {"steps": 3, "micro_batch": None, "updates_per_batch": 1, "max_skipped": 5, **training}
    return SimpleNamespace(seed=0, optimizer=optimizer, training=SimpleNamespace(**settings))


def batch(size: int = 1) -> Batch:
    return Batch(torch.zeros(size, 3, 1, 1), torch.zeros(size), torch.arange(size), torch.arange(size), 0)


def adamw(value: float, gradients: list[float], rates: list[float], decay: float, settings: Optimizer) -> float:
    """arXiv 1711.05101, Algorithm 2, with its decay multiplied by the rate, as torch and everyone has it."""
    one, two = settings.betas
    first = second = 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        first, second = one * first + (1 - one) * gradient, two * second + (1 - two) * gradient**2
        value -= rate * decay * value
        value -= rate * (first / (1 - one**t)) / (math.sqrt(second / (1 - two**t)) + settings.eps)
    return value


def test_three_updates_by_hand() -> None:
    """Rates of a warm-up, betas, eps (so large that the clip shows), the clip at norm 1, decay of the weight alone."""
    settings = Optimizer(
        learning_rate=0.3, warmup_steps=3, betas=(0.6, 0.8), eps=0.5, weight_decay=0.2, gradient_clip=1.0
    )
    method = Linear()
    trainer = Trainer(recipe_of(settings), method, make_optimizer(method.model, settings), World(0, 1, "cpu"))
    progress = Progress()
    logged = [next(trainer.updates(batch(), step, progress)) for step in range(3)]
    assert [row["learning_rate"] for row in logged] == pytest.approx([0.1, 0.2, 0.3])
    assert [row["gradient_norm"] for row in logged] == pytest.approx([5.0, 0.5, 1.0])
    clipped = [(0.6, 0.8), (0.3, -0.4), (-1.0, 0.0)]
    for parameter, start, column, decay in ((method.model.weight, 2.0, 0, 0.2), (method.model.bias, -1.0, 1, 0.0)):
        expected = adamw(start, [row[column] for row in clipped], [0.1, 0.2, 0.3], decay, settings)
        assert parameter.item() == pytest.approx(expected, rel=1e-5)


def test_a_skipped_update_changes_nothing_and_the_next_is_as_if_it_had_not_been() -> None:
    settings = Optimizer(learning_rate=0.1, weight_decay=0)
    method = Linear([(3.0, 4.0), (math.inf, 0.0), (3.0, 4.0)])
    trainer = Trainer(recipe_of(settings), method, make_optimizer(method.model, settings), World(0, 1, "cpu"))
    progress = Progress()
    values = [2.0]
    for step in range(3):
        next(trainer.updates(batch(), step, progress))
        values.append(method.model.weight.item())
    assert values == pytest.approx([2.0, 1.9, 1.9, 1.8])
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (3, 1, 0)


def test_norms_are_not_decayed() -> None:
    optimizer = make_optimizer(tiny.generator(), Optimizer(learning_rate=1e-3, weight_decay=0.3))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert len(spared["params"]) == 2 * tiny.GENERATOR.n_layer + 1


def test_learning_rate() -> None:
    settings = Optimizer(learning_rate=1.0, warmup_steps=4, schedule="cosine")
    assert [learning_rate(settings, step, 12) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert learning_rate(settings, 8, 12) == pytest.approx(0.5)
    assert learning_rate(settings, 11, 12) == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    constant = Optimizer(learning_rate=2.0)
    assert learning_rate(constant, 0, 12) == learning_rate(constant, 99, 12) == 2.0


# -- dropout's masks


class Masks(Linear):
    """A method that draws what dropout would, and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[float, ...]] = []

    def loss(self, batch: Batch, step: int, rollout: None = None) -> Outcome:
        self.drawn.append(tuple(torch.rand(4).tolist()))
        return Outcome((self.model.weight * 0 + self.model.bias * 0).sum(), {})


def masks(step: int = 0, rank: int = 0, seed: int = 0, micro_batch: int | None = None) -> list[tuple[float, ...]]:
    settings = Optimizer(learning_rate=1e-9)
    recipe = recipe_of(settings, micro_batch=micro_batch)
    recipe.seed = seed
    method = Masks()
    # One process that believes to be number `rank`, with nobody to wait for
    trainer = Trainer(recipe, method, make_optimizer(method.model, settings), World(rank, 1, "cpu"))
    next(trainer.updates(batch(4), step, Progress(step=step)))
    return method.drawn


def test_dropouts_masks_are_of_seed_step_process_and_micro_batch() -> None:
    (plain,) = masks()
    torch.manual_seed(99)
    assert masks() == [plain]  # and of nothing else
    halves = masks(micro_batch=2)
    assert halves[0] == plain
    others = [*masks(step=1), *masks(rank=1), *masks(seed=1), halves[1], *masks(step=1, rank=1)]
    assert len({plain, *others}) == 6


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def follow(settings: Optimizer, gradients: Sequence[Tensor]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer after updates of these gradients of its weight."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32, bias=False)
    optimizer = make_optimizer(model, settings, seed=7)
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimizer.step()
    return model, optimizer


def test_moments_in_bf16_go_where_those_in_fp32_go() -> None:
    """The second falls to a ninth over the run; rounded to the nearest it would not move, and the weights lag."""
    draws = torch.Generator().manual_seed(1)
    gradients = [torch.randn(32, 64, generator=draws) * (3.0 if step < 20 else 1.0) for step in range(1500)]
    results = {}
    for precision in ("fp32", "bf16"):
        settings = Optimizer(learning_rate=1e-3, weight_decay=0.1, state_precision=precision)
        results[precision] = follow(settings, gradients)
    (plain, exact), (model, optimizer) = results["fp32"], results["bf16"]
    assert {tensor.dtype for tensor in moments(optimizer)} == {torch.bfloat16}
    means = [tensor.float().mean().item() for tensor in moments(optimizer)]
    expected = [tensor.mean().item() for tensor in moments(exact)]
    assert means[1] == pytest.approx(expected[1], rel=0.01)
    drift = (model.weight - plain.weight).norm() / (plain.weight - follow(settings, [])[0].weight).norm()
    assert drift < 0.02


def test_rounding_at_random_is_right_on_average() -> None:
    values = torch.tensor([1.0, 1.001, -1.001, 3e-20, -0.0]).repeat(20000, 1)
    rounded = _rounded(values.clone(), torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(rounded.mean(dim=0), values[0], rtol=1e-4, atol=0)
    assert sorted(set(rounded[:, 1].tolist())) == [1.0, 1.0078125]
    assert set(rounded[:, 0].tolist()) == {1.0}


def test_moments_in_bf16_are_restored_as_they_were() -> None:
    draws = torch.Generator().manual_seed(1)
    gradients = [torch.randn(32, 64, generator=draws) for _ in range(6)]
    settings = Optimizer(learning_rate=1e-3, state_precision="bf16")
    whole, _ = follow(settings, gradients)
    half, optimizer = follow(settings, gradients[:3])
    again, other = follow(settings, [])
    again.load_state_dict(half.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for gradient in gradients[3:]:
        again.weight.grad = gradient.clone()
        other.step()
    assert torch.equal(again.weight, whole.weight)
    assert not torch.equal(again.weight, half.weight)
