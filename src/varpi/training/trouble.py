"""What goes wrong in the midst of training, said in one line with what to do and where to go on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from varpi.errors import VarpiError
from varpi.methods.image_rewards import RewardFailed
from varpi.runtime.files import line
from varpi.training.logging import Metrics
from varpi.training.state import Progress, newest_kept

_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
_OVERFLOW = ("without overflow", "result too large")
_LOST = ("connection closed by peer", "connection reset by peer", "nccl error", "remote process exited")


@contextmanager
def explained(run: Path, progress: Progress) -> Iterator[None]:
    """Say in one VarpiError what to do when memory is short, a number overflows, or a process or a reward fails."""
    try:
        yield
    except RewardFailed as error:
        raise VarpiError(f"after step {progress.step}: {error}; {newest_kept(run)}") from error
    except FloatingPointError as error:
        raise VarpiError(f"{error}; {newest_kept(run)}") from error
    except (MemoryError, OverflowError, RuntimeError) as error:
        text, details = str(error).lower(), f" ({line(error)})"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in _NO_MEMORY):
            what = (
                "out of memory; use more processes, or start again with a lower training.micro_batch (and "
                "method.reward.decode_batch, if there is one) or, of a generator, training.gradient_checkpointing: true"
            )
        elif isinstance(error, OverflowError) or any(words in text for words in _OVERFLOW):
            what = "a number overflowed in the update; start again with a lower optimizer.learning_rate"
        elif "dataloader worker" in text:
            what = "a worker that loads data was killed, for want of memory perhaps; set data.workers lower"
        elif any(words in text for words in _LOST):
            what = "another process of the run has ended; what it said tells why"
            details = ""  # all others say this, and by the same words it is said once
        else:
            raise
        raise VarpiError(f"after step {progress.step}: {what}{details}; {newest_kept(run)}") from error


class EqualRewards:
    """Warns when nothing is learned from the rewards because all samples of every image have the same one."""

    PATIENCE = 5

    def __init__(self) -> None:
        self._steps = 0
        self._next = self.PATIENCE

    def see(self, step: int, metrics: Metrics) -> None:
        """Look at a step's metrics; warns after 5 such steps in a row, then after 50, 500, …"""
        if "equal_groups" not in metrics:
            return
        if metrics["equal_groups"] < 1:
            self._steps, self._next = 0, self.PATIENCE
            return
        self._steps += 1
        if self._steps < self._next:
            return
        self._next *= 10
        entropy = metrics["entropy"]
        if entropy < 0.05:
            cause = (
                f"the generator always draws the same tokens (entropy {entropy:.2g} nats); it has collapsed, or was "
                "trained on these very images: try an earlier checkpoint, more prior_weight, or context_noise"
            )
        else:
            cause = (
                f"the samples differ (entropy {entropy:.2g} nats) but their reward, {metrics['reward_mean']:.4g}, does "
                "not: check that tokenizer and generator belong together, and the weights of the reward"
            )
        logging.getLogger("varpi").warning(
            "step %d: for %d steps all advantages were 0, so the policy term taught nothing: %s",
            step,
            self._steps,
            cause,
        )
