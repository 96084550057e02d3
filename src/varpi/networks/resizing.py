"""Images brought to the size that a network was trained on.

Shapes: B images of H x W pixels.
"""

from torch import Tensor
from torch.nn import functional


def resize_like_pillow(images: Tensor, size: int) -> Tensor:
    """Bicubic resize of uint8 (B,3,H,W) to whole values in [0, 255], within one of Pillow's: float32.

    Pillow resizes the rows, rounds and clips, and then the columns likewise.
    """
    resized = images.float()
    for shape in ((images.shape[2], size), (size, size)):
        if resized.shape[2:] != shape:
            resized = functional.interpolate(resized, shape, mode="bicubic", antialias=True, align_corners=False)
            resized = resized.round().clamp(0, 255)
    return resized
