"""Low-rank adapters: nothing changes at first, only they learn, and what is saved has them merged."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training_runs import crash, numbers, quiet, same, weights

from varpi.errors import VarpiError
from varpi.recipe import Recipe
from varpi.weights import load_generator, save_generator
from varpi.weights.lora import add_adapters, without_adapters

TOKENS = torch.arange(32).view(2, 16)
CLASSES = torch.tensor([0, 2])


def adapted(scale: float = 0.0, **settings: object) -> tiny.LlamaGen:
    """The tiny generator with adapters whose B is not zero but random, of this size."""
    generator = tiny.generator()
    add_adapters(generator, **{"rank": 2, "alpha": 4.0, **settings})  # pyright: ignore[reportArgumentType]
    draws = torch.Generator().manual_seed(0)
    for name, parameter in generator.named_parameters():
        if ".lora_B." in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=draws)
    return generator


def recipe(pair: Path, *settings: str) -> Recipe:
    return tiny.recipe(pair, "lora.rank=2", "training.save_every=2", *settings)


def test_fresh_adapters_change_nothing() -> None:
    with torch.no_grad():
        assert torch.equal(adapted().logits(TOKENS, CLASSES), tiny.generator().logits(TOKENS, CLASSES))


def test_adapters_can_be_left_out_for_a_while() -> None:
    """Also between a pass with them and its backward."""
    generator = adapted(scale=0.5)
    logits = generator.logits(TOKENS, CLASSES)
    with torch.no_grad(), without_adapters(generator):
        assert torch.equal(generator.logits(TOKENS, CLASSES), tiny.generator().logits(TOKENS, CLASSES))
    assert not torch.equal(logits, tiny.generator().logits(TOKENS, CLASSES))
    assert torch.equal(generator.logits(TOKENS, CLASSES), logits)
    logits.sum().backward()
    assert all(p.grad is not None for p in generator.parameters() if p.requires_grad)


def test_only_adapters_of_the_blocks_are_trainable() -> None:
    generator = adapted()
    trainable = {name: p.shape for name, p in generator.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 5  # A and B, two blocks, five linear layers each
    assert all(name.startswith("blocks.") and ".lora_" in name for name in trainable)
    assert trainable["blocks.0.attention.qkv.lora_A.default.weight"] == (2, 32)
    assert trainable["blocks.0.attention.qkv.lora_B.default.weight"] == (96, 2)


def test_targets_by_the_last_part_of_their_names() -> None:
    names = [name for name, p in adapted(targets=["qkv"]).named_parameters() if p.requires_grad]
    assert len(names) == 4
    assert all(".attention.qkv." in name for name in names)
    with pytest.raises(
        VarpiError, match=r"no linear layer of the blocks is called 'q_proj'; known: down, gate, out, qkv"
    ):
        adapted(targets=["q_proj"])


def test_saved_weights_are_merged(tmp_path: Path) -> None:
    generator = adapted(scale=0.1)
    save_generator(generator, tmp_path / "merged.safetensors")
    assert load_file(tmp_path / "merged.safetensors").keys() == tiny.generator().state_dict().keys()
    merged = load_generator(tmp_path / "merged.safetensors")
    with torch.no_grad():
        logits = generator.logits(TOKENS, CLASSES)
        assert (merged.logits(TOKENS, CLASSES) - logits).abs().max() < 1e-5
        assert (tiny.generator().logits(TOKENS, CLASSES) - logits).abs().max() > 0.1


def test_merging_by_hand(tmp_path: Path) -> None:
    generator = adapted(scale=0.1)
    save_generator(generator, tmp_path / "merged.safetensors")
    layer = generator.get_submodule("blocks.1.feed_forward.up")
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # pyright: ignore
    expected = tiny.generator().state_dict()["blocks.1.feed_forward.up.weight"] + 4.0 / 2 * up @ down
    found = load_file(tmp_path / "merged.safetensors")["blocks.1.feed_forward.up.weight"]
    assert torch.allclose(found, expected, atol=1e-7)


def test_a_small_update_survives_a_base_in_bf16(tmp_path: Path) -> None:
    """A thousandth of a weight is less than bfloat16 can tell from it."""
    generator = tiny.generator().bfloat16()
    base = generator.blocks[0].attention.qkv.weight.float().clone()  # pyright: ignore
    add_adapters(generator, rank=2, alpha=2.0, targets=["qkv"])
    layer = generator.get_submodule("blocks.0.attention.qkv")
    layer.lora_B["default"].weight.data.fill_(1e-5)  # pyright: ignore
    save_generator(generator, tmp_path / "merged.safetensors")
    update = load_file(tmp_path / "merged.safetensors")["blocks.0.attention.qkv.weight"] - base
    expected = 1e-5 * layer.lora_A["default"].weight.sum(0)  # pyright: ignore
    assert torch.allclose(update, expected.expand_as(update), atol=1e-8)


def test_training_moves_adapters_alone_and_resumes_to_the_bit(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quiet(recipe(pair), tmp_path / "whole")
    crash(monkeypatch, recipe(pair), tmp_path / "cut", 3)
    resumed = quiet(recipe(pair), tmp_path / "cut", resume=True)
    assert same(weights(whole), weights(resumed))
    assert numbers(whole) == numbers(resumed)
    before, after = load_file(pair / "generator.safetensors"), weights(whole)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("blocks.") and "norm" not in name}


def test_checkpoints_hold_no_frozen_weights(pair: Path, tmp_path: Path) -> None:
    def size(run: Path) -> int:
        return sum(path.stat().st_size for path in (run / "checkpoints" / "step-00000006").glob("*.distcp"))

    settings = ("training.save_every=6",)
    adapters = quiet(recipe(pair, *settings), tmp_path / "lora")
    everything = quiet(tiny.recipe(pair, *settings), tmp_path / "full")
    assert size(adapters) < 0.5 * size(everything)


def test_lora_needs_a_pretrained_generator(pair: Path) -> None:
    with pytest.raises(VarpiError, match="lora adapts a pretrained generator"):
        tiny.recipe(
            pair, "lora.rank=2", "generator.source=null", "generator.architecture=llamagen-c2i-b", method="next_token"
        )
