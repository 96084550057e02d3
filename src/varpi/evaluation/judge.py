"""The judge: a small classifier trained apart from every reward, whose features and verdicts measure the embedded digits.

Shapes: n images, D features.
"""

import os
from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from varpi.errors import VarpiError
from varpi.evaluation.images import from_uint8, to_uint8
from varpi.objective.features import SmallConvNet


def load_judge(path: str | os.PathLike[str] | None = None, *, device: torch.device | str = "cpu") -> SmallConvNet:
    """The judge that ships with the package, or one from a safetensors file; frozen, in eval mode.

    Its sizes are read off its tensors. Raises VarpiError for a missing or unreadable file, or tensors of another network.
    """
    if path is None:
        with as_file(files("varpi.embedded") / "digits-judge.safetensors") as embedded:
            return load_judge(embedded, device=device)
    if not Path(path).is_file():
        raise VarpiError(f"{path}: no such file; the judge is a safetensors file of a SmallConvNet")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise VarpiError(f"{path}: cannot be read as safetensors ({error})") from error
    try:
        stages = {key.split(".")[1] for key in state if key.startswith("stages.")}
        channels = [len(state[f"stages.{i}.0.weight"]) for i in range(len(stages))]
        judge = SmallConvNet(channels, num_classes=len(state["head.weight"]))
        judge.load_state_dict(state)
    except (KeyError, RuntimeError, VarpiError) as error:
        raise VarpiError(f"{path}: does not hold a SmallConvNet ({' '.join(str(error).split())})") from error
    return judge.eval().requires_grad_(False).to(device)


@torch.no_grad()
def embed(judge: SmallConvNet, images: torch.Tensor, *, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """What the judge sees in images (n,3,H,W) in [-1,1]: features float32 (n,D) and classes int64 (n,), on the CPU.

    Images are quantized to 8 bits first, as saved ones are, so that no model gains by colours that no file can hold.
    Raises VarpiError for no images, another shape or non-finite pixels.
    """
    if len(images) == 0:
        raise VarpiError("the judge got no images")
    device = next(judge.parameters()).device
    features, classes = [], []
    for batch in images.split(batch_size):
        embedding = judge.embedding(from_uint8(to_uint8(batch)).to(device))
        features.append(embedding.cpu())
        classes.append(judge.head(embedding).argmax(dim=1).cpu())
    return torch.cat(features), torch.cat(classes)
