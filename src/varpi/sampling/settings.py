"""What shapes the samples of a generator: one object, from the command line to the record beside the images."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Literal

from varpi.errors import VarpiError

Schedule = Literal["constant", "power-cosine"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of `generate`. The command line has a flag for each field, with the words beside its type.

    Guidance follows LlamaGen's sampler (arXiv 2406.06525): logits are `null + s (conditional - null)`. The schedule
    "power-cosine" is that of VA-π's released one: the first token has the full scale s, decoding step i of M = N - 1
    (which makes token i + 1) the scale 1 + (s - 1) (1 - cos(π (i / M) ** guidance_power)) / 2.

    Raises VarpiError for values out of range.
    """

    guidance_scale: Annotated[float, "s >= 0; up to 1 is no guidance, which costs half as much"] = 1.0
    guidance_interval: Annotated[int, "k >= 0 guides the first k + 2 tokens only; -1: every one"] = -1
    guidance_schedule: Annotated[Schedule, "of the scale over the decoding steps"] = "constant"
    guidance_power: Annotated[float, "of power-cosine, above 0"] = 2.0
    temperature: Annotated[float, "above 0; logits are divided by it"] = 1.0
    top_k: Annotated[int, "draw from the k most probable tokens; 0: from all"] = 0
    top_p: Annotated[float, "draw from the fewest tokens whose sum exceeds p in (0, 1]; 1: from all"] = 1.0
    greedy: Annotated[bool, "always the most probable token"] = False
    seed: Annotated[int | None, "in [0, 2**63)"] = None
    """Image i depends on it and on i alone; without one, `generate` draws one from torch's global state."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, plain = getattr(self, setting.name), type(setting.default)
            if plain in (int, float) and not isinstance(value, int if plain is int else int | float):
                what = "a whole number" if plain is int else "a number"
                raise VarpiError(f"{setting.name} is {value!r}; it must be {what}")
        if not 0 <= self.guidance_scale < math.inf:
            raise VarpiError(f"guidance_scale is {self.guidance_scale}; it must be at least 0 and finite")
        if self.guidance_interval < -1:
            raise VarpiError(
                f"guidance_interval is {self.guidance_interval}; it must be at least 0, or -1 for every token"
            )
        if self.guidance_schedule not in ("constant", "power-cosine"):
            raise VarpiError(
                f"guidance_schedule is {self.guidance_schedule!r}; it must be 'constant' or 'power-cosine'"
            )
        if not 0 < self.guidance_power < math.inf:
            raise VarpiError(f"guidance_power is {self.guidance_power}; it must be above 0 and finite")
        if not 0 < self.temperature < math.inf:
            raise VarpiError(
                f"temperature is {self.temperature}; it must be above 0 and finite (for the most probable: greedy)"
            )
        if self.top_k < 0:
            raise VarpiError(f"top_k is {self.top_k}; it must be at least 1, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise VarpiError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if self.seed is not None and not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise VarpiError(f"seed is {self.seed}; it must be a whole number in [0, 2**63)")

    def scales(self, num_tokens: int) -> list[float]:
        """The guidance scale of each token. The first comes from the prefill, which knows no interval or schedule."""
        steps, scale = num_tokens - 1, self.guidance_scale
        scales = [scale]
        for i in range(steps):
            if 0 <= self.guidance_interval < i:
                scales.append(1.0)
            elif self.guidance_schedule == "power-cosine":
                turn = math.cos(math.pi * (i / steps) ** self.guidance_power)
                scales.append(1 + (scale - 1) * (1 - turn) / 2)
            else:
                scales.append(scale)
        return scales
