"""A reward of your own: generated digits shall be as bold as you like them.

    PYTHONPATH=examples varpi train digits-ar-grpo --output runs/bold \
        --set 'method.rewards={function: {path: "own_reward:bold"}}'

A reward gets the images that were generated and what was asked of each, and gives a number for each, larger is better.
It may do anything: call a network, a simulator or a person. Write `http: {url: …}` in place of `function` for one that
runs elsewhere.
"""

import torch

INK = 0.25
"""The share of white that a digit shall have."""


def bold(images: torch.Tensor, asked: torch.Tensor | list[str]) -> torch.Tensor:
    """images: uint8 (B,3,H,W). asked: class ids (B,), or a list of captions. Returns (B,), at most 0."""
    ink = images.float().mean(dim=(1, 2, 3)) / 255
    return -((ink - INK) ** 2)
