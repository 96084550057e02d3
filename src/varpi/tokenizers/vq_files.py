"""LlamaGen's VQ tokenizers in files: the released shapes, and what tensors tell of one.

The module names of `VQ` are those of the released files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from varpi.errors import VarpiError
from varpi.runtime.pretrained import Pretrained, whole_number

ARCHITECTURES = ("vq-16", "vq-8")
MULTIPLIERS: dict[int, tuple[int, ...]] = {16: (1, 1, 2, 2, 4), 8: (1, 2, 2, 4), 4: (1, 2, 4)}


@dataclass(frozen=True)
class VQConfig:
    """The shape of a VQ tokenizer; the defaults are VQ-16's."""

    downsample: int = 16
    channels: int = 128
    codebook_size: int = 16384
    codebook_dim: int = 8
    channel_multipliers: tuple[int, ...] | None = None
    """Width of each resolution level, in units of `channels`; by default that of the released VQ-16 and VQ-8."""
    latent_channels: int = 256
    norm_groups: int = 32
    encoder_blocks: int = 2
    decoder_blocks: int = 3

    def __post_init__(self) -> None:
        for name, most in (
            ("downsample", 2**10),
            ("channels", 2**16),
            ("codebook_size", 2**24),
            ("codebook_dim", 2**16),
            ("latent_channels", 2**16),
            ("norm_groups", 2**16),
            ("encoder_blocks", 64),
            ("decoder_blocks", 64),
        ):
            whole_number("VQConfig", name, getattr(self, name), most)
        given = self.channel_multipliers
        if given is None:
            if self.downsample not in MULTIPLIERS:
                raise VarpiError(
                    f"VQConfig: no default channel_multipliers for downsample {self.downsample}; give them"
                )
            given = MULTIPLIERS[self.downsample]
        if not isinstance(given, list | tuple) or not all(type(factor) is int for factor in given):
            raise VarpiError(f"VQConfig: channel_multipliers is {given!r:.80}; it must be a list of whole numbers")
        object.__setattr__(self, "channel_multipliers", tuple(given))
        if 2 ** (len(given) - 1) != self.downsample:
            raise VarpiError(
                f"VQConfig: {len(given)} channel_multipliers down-sample by {2 ** (len(given) - 1)}, not by "
                f"{self.downsample}"
            )
        for width in (self.channels * factor for factor in given):
            if width < 1 or width % self.norm_groups:
                raise VarpiError(f"VQConfig: {width} channels do not divide into {self.norm_groups} norm groups")

    @property
    def multipliers(self) -> tuple[int, ...]:
        assert self.channel_multipliers is not None
        return self.channel_multipliers


def config_for(architecture: str) -> VQConfig:
    """The configuration of a released tokenizer, one of `ARCHITECTURES`."""
    return VQConfig(downsample=int(architecture.split("-")[1]))


def config_from(source: Pretrained) -> tuple[VQConfig, str]:
    """The configuration of a checkpoint, and what to call where it is from."""
    facts = facts_of(source.tensors)
    return source.resolve(
        VQConfig,
        facts,
        named=config_for,
        implied=lambda: _implied(source.where, facts),
        unseen=("norm_groups",),
    )


def facts_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a `VQConfig` that the tensors reveal, as far as they are there."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    facts: dict[str, Any] = {}
    if len(codes := shape.get("quantize.embedding.weight", ())) == 2:
        facts["codebook_size"], facts["codebook_dim"] = codes
    if len(conv := shape.get("quant_conv.weight", ())) == 4:
        facts["latent_channels"] = conv[1]
    if (conv_in := shape.get("encoder.conv_in.weight")) is not None and len(conv_in) == 4:
        facts["channels"] = conv_in[0]
        levels = [shape.get(f"encoder.conv_blocks.{level}.res.0.conv1.weight") for level in range(_count(shape))]
        if levels and all(level and level[0] % conv_in[0] == 0 for level in levels):
            facts["channel_multipliers"] = tuple(level[0] // conv_in[0] for level in levels if level)
            facts["downsample"] = 2 ** (len(levels) - 1)
    for side in ("encoder", "decoder"):
        blocks = [name for name in shape if re.fullmatch(rf"{side}\.conv_blocks\.0\.res\.\d+\.conv1\.weight", name)]
        if blocks:
            facts[f"{side}_blocks"] = len(blocks)
    return facts


def _count(shape: Mapping[str, tuple[int, ...]]) -> int:
    """How many resolution levels the encoder has."""
    levels = [int(match[1]) for name in shape if (match := re.match(r"encoder\.conv_blocks\.(\d+)\.", name))]
    return max(levels, default=-1) + 1


def _implied(where: str, facts: Mapping[str, Any]) -> VQConfig:
    """The configuration that the facts imply."""
    needed = ("codebook_size", "latent_channels", "channels", "downsample", "encoder_blocks", "decoder_blocks")
    absent = [field for field in needed if field not in facts]
    if absent:
        raise VarpiError(f"{where}: its tensors do not tell {', '.join(absent)}; name the architecture (vq-16, vq-8)")
    return VQConfig(**facts)
