"""A decode step as a CUDA graph: recorded once, replayed at every position, so that the host launches one thing."""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
"""Tokens (B,) and their position () to logits (B,V)."""


class Recorded:
    """A step whose shapes and addresses are the same at every position, as those on a static cache are.

    Its first call records it. What a call returns is overwritten by the next.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.replay: Callable[[], None] | None = None

    def __call__(self, tokens: Tensor, position: Tensor) -> Tensor:
        if self.replay is None:
            self.tokens, self.position = tokens.clone(), position.clone()
            self.replay, self.logits = record(lambda: self.step(self.tokens, self.position))
        self.tokens.copy_(tokens)
        self.position.copy_(position)
        self.replay()
        return self.logits


def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What runs `function` again, on the same memory, and the tensor that then holds its result.

    It has run twice before, on another stream, as recording asks for: libraries set themselves up in a first call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result
