"""What models draw for a page to show: free-running samples, and held-out images seen through them."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from varpi import objective
from varpi.data import Dataset
from varpi.data.pixels import to_uint8
from varpi.report.pictures import Reconstruction, SampleGrid
from varpi.runtime.randomness import Stream, uniforms
from varpi.sampling.generate import generate_with
from varpi.sampling.settings import Sampling


@torch.inference_mode()
def decode_in_parts(tokenizer: Any, tokens: Tensor, batch_size: int = 100) -> Tensor:
    """Tokens (B,N) to images (B,3,H,W), `batch_size` at a time."""
    return torch.cat([tokenizer.decode(part) for part in tokens.split(batch_size)])


def draw_samples(
    caption: str,
    generator: Any,
    tokenizer: Any,
    condition: Any,
    sampling: Sampling,
    asked: Sequence[str] | None = None,
    *,
    progress: bool = False,
) -> SampleGrid:
    """Free-running samples, one per class id or caption; the same seed gives the same random numbers to every model.

    asked: what to call the conditions, where these are not class ids. progress: show a bar on a terminal.
    """
    tokens = generate_with(generator, condition, sampling, progress=progress and sys.stderr.isatty())
    images = to_uint8(decode_in_parts(tokenizer, tokens))
    return SampleGrid(caption, images, condition.tolist() if asked is None else asked)


@torch.inference_mode()
def reconstructions(
    base: Any, tuned: Any, tokenizer: Any, dataset: Dataset, indices: Sequence[int]
) -> list[Reconstruction]:
    """Held-out images through the tokenizer, and sampled by both models under teacher forcing from the same numbers."""
    items = [dataset[index] for index in indices]
    device = next(iter(tokenizer.parameters())).device
    images = torch.stack([item.image for item in items]).to(device)
    tokens = tokenizer.encode(images)
    condition = base.prepare_condition([item.condition for item in items])
    draws = uniforms(0, 0, range(len(items)), (1, tokens.shape[1]), stream=Stream.REPORT_SAMPLES, device=str(device))
    rows = [images, tokenizer.decode(tokens)]
    for generator in (base, tuned):
        samples = objective.sample_tokens(generator.eval().logits(tokens, condition), 1, uniforms=draws)
        rows.append(tokenizer.decode(samples[:, 0]))
    return [Reconstruction(*pictures) for pictures in zip(*(to_uint8(row) for row in rows), strict=True)]
