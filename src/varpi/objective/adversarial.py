"""The hinge losses of a tokenizer and its discriminator, as in VQGAN (arXiv 2012.09841) and LlamaGen (2406.06525).

Logits have any shape, high for real.
"""

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the logits of images and of reconstructions: half of mean(1 - real)₊ + mean(1 + fake)₊."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adversarial_loss(fake: Tensor) -> Tensor:
    """What the tokenizer lowers: minus the mean logit of its reconstructions."""
    return -fake.mean()
