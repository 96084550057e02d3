"""LlamaGen's VQ tokenizer (arXiv 2406.06525), VQ-16 and VQ-8, also Janus' image tokenizer.

Shapes: B images, (h,w) = (H,W) / downsample, N = h w tokens, K codes of width C.

Module names are those of the released checkpoints. Latents and codes are compared, and codes are decoded, as unit
vectors.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.runtime.pretrained import Assembled, Family, Pretrained
from varpi.tokenizers.tokenizer import Tokenizer
from varpi.tokenizers.vq_files import ARCHITECTURES, VQConfig, config_for, config_from

__all__ = ["FAMILY", "VQ", "VQConfig"]


def _silu(x: Tensor) -> Tensor:
    """Of a norm's result, which nothing else reads: in its place where no gradient needs it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_silu(self.norm1(x)))
        h = self.conv2(_silu(self.norm2(h)))
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return h + shortcut if torch.is_grad_enabled() else h.add_(shortcut)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    folded: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "folded"):
            return self._folded(x)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    @torch.no_grad()
    def fold(self) -> None:
        """From now on convolve x itself, at four ninths of the work, by sums of the kernel as it is now.

        Of the 3x3 neighbours in the doubled image those that are copies of one pixel share the sum of their weights:
        every other row of the result, and every other column, sees 2x2 pixels of x through a kernel of its own.
        """
        even, odd = [1, 2], [2, 1]  # how many rows or columns of the kernel fall on the two pixels
        rows = [_sums(self.conv.weight, 2, sizes) for sizes in (even, odd)]
        kernels = torch.cat([_sums(kernel, 3, sizes) for kernel in rows for sizes in (even, odd)])
        self.register_buffer("folded", kernels, persistent=False)

    def _folded(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        out = x.new_empty(batch, height, 2, width, 2, self.conv.out_channels)  # channels last
        for i, kernel in enumerate(self.folded.chunk(4)):
            row, column = divmod(i, 2)
            padded = F.pad(x, (1 - column, column, 1 - row, row))
            out[:, :, row, :, column] = F.conv2d(padded, kernel, self.conv.bias).permute(0, 2, 3, 1)
        return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _sums(weight: Tensor, dim: int, sizes: list[int]) -> Tensor:
    """Sums of runs of these sizes along a dimension."""
    return torch.cat([part.sum(dim, keepdim=True) for part in weight.split(sizes, dim)], dim)


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention at the lowest one, then a change of resolution."""

    def __init__(self, cin: int, cout: int, blocks: int, attention: bool, groups: int, resample: str | None) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(cin if i == 0 else cout, cout, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(cout, groups) for _ in range(blocks if attention else 0))
        if resample == "down":
            self.downsample = Downsample(cout)
        elif resample == "up":
            self.upsample = Upsample(cout)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        elif hasattr(self, "upsample"):
            x = self.upsample(x)
        return x


def _mid(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResnetBlock(channels, channels, groups),
            AttnBlock(channels, groups),
            ResnetBlock(channels, channels, groups),
        ]
    )


class Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)] if i else config.channels,
                width,
                config.encoder_blocks,
                i == last,
                config.norm_groups,
                "down" if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = _mid(widths[-1], config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in (*self.conv_blocks, *self.mid):
            x = layer(x)
        return self.conv_out(_silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.multipliers)]  # from the lowest resolution upwards
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _mid(widths[0], config.norm_groups)
        self.conv_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.decoder_blocks,
                i == 0,
                config.norm_groups,
                "up" if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in (*self.mid, *self.conv_blocks):
            x = layer(x)
        return self.conv_out(_silu(self.norm_out(x)))


class Codebook(nn.Module):
    """K codes of width C, used as unit vectors."""

    codebook_used: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)
        # A usage statistic of the original training code, kept so that an exported file has every original key.
        self.register_buffer("codebook_used", torch.zeros(65536))

    def unit_codes(self) -> Tensor:
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, latents: Tensor) -> Tensor:
        """The code of greatest cosine similarity: latents (...,C) to int64 (...), in bounded memory."""
        codes = self.unit_codes()
        flat = F.normalize(latents.float(), dim=-1).flatten(0, -2)
        tokens = [(rows @ codes.T).argmax(-1) for rows in flat.split(max(1, 2**26 // len(codes)))]
        return torch.cat(tokens).view(latents.shape[:-1])


class VQ(Tokenizer):
    """The tokenizer."""

    family: ClassVar[str] = "vq"

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook_size = config.codebook_size
        self.downsample = config.downsample
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.codebook_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    def original_content(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {"model": tensors}

    def latents(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1] to latents (B,C,h,w), before quantization."""
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or images.shape[2] % self.downsample
            or images.shape[3] % self.downsample
        ):
            raise VarpiError(
                f"VQ.encode: images have shape {tuple(images.shape)}; they must be (B, 3, H, W) with sides divisible "
                f"by {self.downsample}"
            )
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [-1,1] to int64 tokens (B,N), row-major."""
        return self.quantize.nearest(self.latents(images).permute(0, 2, 3, 1)).flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B,N) of a square grid to float32 images (B,3,H,W), nominally in [-1,1], not clamped."""
        side = math.isqrt(tokens.shape[-1])
        if tokens.ndim != 2 or side * side != tokens.shape[1] or tokens.dtype != torch.int64:
            raise VarpiError(
                f"VQ.decode: tokens are {tokens.dtype} {tuple(tokens.shape)}; they must be int64 (B, N) with N a square"
            )
        codes = F.embedding(tokens, self.quantize.unit_codes()).to(self.post_quant_conv.weight.dtype)
        return self.decode_codes(codes.view(len(tokens), side, side, -1).permute(0, 3, 1, 2))

    def code_vectors(self) -> Tensor:
        """Float32 (K,C): the unit vector that `decode` puts in a token's place."""
        return self.quantize.unit_codes()

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Unit codes (B,C,h,w) to float32 images (B,3,H,W), with gradient."""
        weight = self.post_quant_conv.weight
        if weight.dtype != torch.bfloat16:
            return self.decoder(self.post_quant_conv(codes)).float()
        with torch.autocast(codes.device.type, enabled=False):  # which would compute the norms in float32 on a GPU
            x = self.post_quant_conv(codes.to(weight.dtype).contiguous(memory_format=torch.channels_last))
            return self.decoder(x).float()

    def lower_decoder(self) -> None:
        for module in self.decoder.modules():
            if isinstance(module, Upsample):
                module.fold()
        for part in (self.post_quant_conv, self.decoder):
            part.to(torch.bfloat16).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For training: (reconstruction (B,3,H,W), unit latents (B,C,h,w), their unit codes (B,C,h,w)).

        The reconstruction passes its gradient straight through the quantization to the latents (VQ-VAE,
        arXiv 1711.00937).
        """
        latents = F.normalize(self.latents(images).float(), dim=1)
        tokens = self.quantize.nearest(latents.detach().permute(0, 2, 3, 1))
        codes = F.embedding(tokens, self.quantize.unit_codes()).permute(0, 3, 1, 2)
        return self.decode_codes(latents + (codes - latents).detach()), latents, codes


def assemble(source: Pretrained) -> Assembled:
    """The tokenizer on the meta device, and its weights."""
    config, said = config_from(source)
    with torch.device("meta"):
        return Assembled(VQ(config), source.tensors, said)


def shape(architecture: str, image_size: int | None) -> VQ:
    """The tokenizer of a name, without weights, for images of any size."""
    with torch.device("meta"):
        return VQ(config_for(architecture))


FAMILY = Family(
    "vq",
    ARCHITECTURES,
    tokenizer=assemble,
    known_by=("quantize.embedding.weight",),
    config=VQConfig,
    build=VQ,
    shapes={"tokenizer": shape},
)
