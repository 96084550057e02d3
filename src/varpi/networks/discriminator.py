"""The network that tells images from reconstructions while a tokenizer is trained.

B images, (h,w) patches.
"""

from torch import Tensor, nn

_NORM_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """PatchGAN (pix2pix, arXiv 1611.07004), against which VQGAN (arXiv 2012.09841) and LlamaGen train their tokenizers.

    Group instead of batch normalization: the verdict on an image then depends on that image alone.

    Args:
        channels: width of the first layer, a multiple of 8; it doubles with each layer, up to eight times.
        layers: convolutions of stride 2. With 2 a patch is 34 pixels wide, with 3 it is 70.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = min(2 * width, 8 * channels)
            blocks += [
                nn.Conv2d(width, wider, 4, stride=2 if layer < layers else 1, padding=1, bias=False),
                nn.GroupNorm(_NORM_GROUPS, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        blocks.append(nn.Conv2d(width, 1, 4, padding=1))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every patch, high for real: images (B,3,H,W) in [-1,1] -> float32 (B,1,h,w)."""
        return self.blocks(images).float()
