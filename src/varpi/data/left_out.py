"""What is not used, and the one line in which every command says so."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from varpi.data.dataset import BadImage, Dropped

logger = logging.getLogger(__name__)


class LeftOut:
    """What is not used, counted by reason, with the first example of each.

    parts: what was counted before, by other processes or in other sessions, each as `found` gives it.
    """

    def __init__(self, *parts: Mapping[str, Sequence[Any]]) -> None:
        self.found: dict[str, tuple[int, str]] = {}
        """By reason: how many, and the first of them. Fit for JSON."""
        for part in parts:
            for reason, (count, example) in part.items():
                self.add(reason, example, count)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        before, first = self.found.get(reason, (0, example))
        self.found[reason] = before + count, first

    def note(self, error: BadImage | Dropped) -> None:
        """Count an item that a dataset refused."""
        self.add(error.reason, str(error))

    def count(self, reason: str) -> int:
        return self.found.get(reason, (0, ""))[0]

    def __len__(self) -> int:
        return sum(count for count, _ in self.found.values())

    def __str__(self) -> str:
        return "; ".join(f"{count} {reason} ({example})" for reason, (count, example) in self.found.items())

    def line(self, total: int, what: str) -> str:
        """How many of `total` things, why, and an example of each reason."""
        return f"left out {len(self)} of {total} {what}: {self}"

    def say(self, where: str, total: int, what: str) -> None:
        """Warn of it, in `line`; silent where nothing was left out."""
        if self:
            logger.warning("%s: %s", where, self.line(total, what))
