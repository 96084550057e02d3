"""Reading the golden files: outputs of the original implementations, and the checkpoints that they are outputs of."""

import json
import math
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from golden.fill import fill
from varpi.generators import LlamaGen, LlamaGenConfig
from varpi.tokenizers import VQ
from varpi.weights import to_original

GOLDEN = Path(__file__).parent


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def config_of(metadata: dict[str, str]) -> LlamaGenConfig:
    said = json.loads(metadata["config"])
    return LlamaGenConfig(
        grid=math.isqrt(said.pop("block_size")),
        conditioning="class" if said.pop("model_type") == "c2i" else "text",
        condition_tokens=said.pop("cls_token_num"),
        **said,
    )


def original_state(model: LlamaGen | VQ, salt: str) -> dict[str, Tensor]:
    """A checkpoint with the original keys and shapes, filled by the rule."""
    return fill(to_original(model), salt)
