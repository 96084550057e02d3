"""Low-rank adapters (LoRA, arXiv 2106.09685) on any generator, by `peft`; saved weights have them merged."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from varpi.errors import VarpiError
from varpi.generators import Generator

_ADAPTER = "default"
_MARK = ".lora_A."


def add_adapters(
    generator: Generator, *, rank: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] | None = None
) -> None:
    """Freeze a generator and put a trainable, float32 B A · alpha / rank beside linear layers of its blocks, in place.

    B begins as zero, so that nothing changes at first. targets: last parts of the layers' names ("qkv"); by default
    every linear layer of the blocks.

    Raises:
        VarpiError: a target that no block has, or peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise VarpiError("lora needs: pip install 'varpi[lora]'") from error
    blocks = {id(module) for block in generator.blocks for module in block.modules()}
    layers = [
        name for name, module in generator.named_modules() if isinstance(module, nn.Linear) and id(module) in blocks
    ]
    known = sorted({name.rpartition(".")[2] for name in layers})
    if unknown := sorted(set(targets or ()) - set(known)):
        raise VarpiError(
            f"lora.targets: no linear layer of the blocks is called {unknown[0]!r}; known: {', '.join(known)}"
        )
    chosen = [name for name in layers if targets is None or name.rpartition(".")[2] in targets]
    generator.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)  # pyright: ignore
    inject_adapter_in_model(config, generator, adapter_name=_ADAPTER)
    for name, parameter in generator.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


@contextmanager
def without_adapters(generator: nn.Module) -> Iterator[None]:
    """Within, a generator computes what it did before `add_adapters`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in generator.modules() if isinstance(module, BaseTunerLayer)]
    # Not by peft's own switch, which freezes the adapters too: a pass of theirs may be waiting for its backward.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge(model: Any, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model as if it had never had adapters: W + scaling B A, in float32, under the plain names.

    Merged weights are float32 whatever W is: in bfloat16 most of a small update would be rounded away.
    """
    if not any(_MARK in name for name in state_dict):
        return dict(state_dict)
    merged = {}
    for name, tensor in state_dict.items():
        if ".lora_" in name:
            continue
        layer, base, rest = name.partition(".base_layer")
        if base and f"{layer}.lora_A.{_ADAPTER}.weight" in state_dict and rest == ".weight":
            down, up = (state_dict[f"{layer}.lora_{part}.{_ADAPTER}.weight"].float() for part in "AB")
            tensor = tensor.float() + model.get_submodule(layer).scaling[_ADAPTER] * (up @ down)
        merged[layer + rest] = tensor
    return merged
