"""Models against the golden outputs of the original implementations, their weights loaded as any foreign checkpoint."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden import config_of, fill, golden, original_state
from torch import Tensor

from varpi.generators import LlamaGen, LlamaGenConfig, TextCondition
from varpi.sampling.generate import filter_logits, generate
from varpi.sampling.settings import Sampling
from varpi.tokenizers import VQ, VQConfig
from varpi.weights import load_generator, load_tokenizer, to_original
from varpi.weights.names import original_name

GRADIENTS = (
    "cls_embedding.embedding_table.weight",
    "layers.0.attention.wqkv.weight",
    "output.weight",
    "tok_embeddings.weight",
)


@pytest.fixture(scope="module")
def c2i() -> tuple[LlamaGen, dict[str, Tensor]]:
    values, metadata = golden("llamagen_c2i_small")
    config = config_of(metadata)
    generator = load_generator(original_state(LlamaGen(config), metadata["salt"]), architecture=config)
    assert isinstance(generator, LlamaGen)
    return generator, values


def test_fixture_keys_are_the_original_ones(c2i: tuple[LlamaGen, dict[str, Tensor]]) -> None:
    keys = set(to_original(c2i[0]))
    assert set(GRADIENTS) <= keys
    assert len(keys) == 4 + 3 * 7
    assert {"layers.2.feed_forward.w3.weight", "layers.0.ffn_norm.weight", "norm.weight"} <= keys


def test_class_logits_loss_and_gradients(c2i: tuple[LlamaGen, dict[str, Tensor]]) -> None:
    generator, values = c2i
    assert int(values["classes"].max()) == generator.config.num_classes  # the null class is among them
    logits = generator.logits(values["tokens"], values["classes"])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, values["logits"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), values["tokens"].flatten())
    torch.testing.assert_close(loss, values["ce"], atol=1e-5, rtol=0)
    loss.backward()
    parameters = {
        "cls_embedding.embedding_table.weight": generator.class_embedding.weight,
        "layers.0.attention.wqkv.weight": generator.get_parameter("blocks.0.attention.qkv.weight"),
        "output.weight": generator.output.weight,
        "tok_embeddings.weight": generator.token_embedding.weight,
    }
    for name in GRADIENTS:
        torch.testing.assert_close(parameters[name].grad, values[f"grad_ce.{name}"], atol=1e-6, rtol=1e-4)
    generator.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("cfg1", {}),
        ("cfg2", {"guidance_scale": 2.0}),
        ("cfg4_interval20", {"guidance_scale": 4.0, "guidance_interval": 20}),
        (
            "cfg3_powercos",
            {"guidance_scale": 3.0, "guidance_schedule": "power-cosine", "guidance_power": 2.0},
        ),
    ],
)
def test_class_greedy_tokens(c2i: tuple[LlamaGen, dict[str, Tensor]], name: str, guidance: dict) -> None:
    generator, values = c2i
    tokens = generate(generator, values["greedy.classes"], greedy=True, **guidance)
    assert torch.equal(tokens, values[f"greedy.{name}"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk20", {"top_k": 20}),
        ("topk50_topp0.9", {"top_k": 50, "top_p": 0.9}),
        ("topp0.7_t0.8", {"top_p": 0.7, "temperature": 0.8}),
    ],
)
def test_filtered_probabilities(c2i: tuple[LlamaGen, dict[str, Tensor]], name: str, settings: dict) -> None:
    values = c2i[1]
    probabilities = filter_logits(values["probs.logits"], Sampling(**settings))
    torch.testing.assert_close(probabilities, values[f"probs.{name}"], atol=1e-6, rtol=0)
    assert torch.equal(probabilities == 0, values[f"probs.{name}"] == 0)


def test_text_logits_loss_and_greedy_tokens() -> None:
    values, metadata = golden("llamagen_t2i_small")
    config = config_of(metadata)
    generator = load_generator(original_state(LlamaGen(config), metadata["salt"]), architecture=config)
    condition = TextCondition(values["features"], values["feature_mask"].bool())
    with torch.no_grad():
        logits = generator.logits(values["tokens"], condition)
    torch.testing.assert_close(logits, values["logits"], atol=1e-4, rtol=0)
    loss = F.cross_entropy(logits.flatten(0, 1), values["tokens"].flatten())
    torch.testing.assert_close(loss, values["ce"], atol=1e-5, rtol=0)
    assert torch.equal(generate(generator, condition, greedy=True), values["greedy.cfg1"])
    guided = generate(generator, condition, greedy=True, guidance_scale=7.5)
    assert torch.equal(guided, values["greedy.cfg7.5"])


def test_gpt_b_at_full_size() -> None:
    values, metadata = golden("llamagen_gpt_b_256")
    with torch.device("meta"):
        keys = {name: tensor.shape for name, tensor in LlamaGen(LlamaGenConfig.named("b")).state_dict().items()}
    assert sum(math.prod(shape) for shape in keys.values()) == 110_888_448
    state = {name: torch.empty(shape) for name, shape in original_shapes("b").items()}
    generator = load_generator(fill(state, metadata["salt"]), image_size=256)  # the size is read from the tensors
    assert isinstance(generator, LlamaGen)
    assert generator.config == LlamaGenConfig.named("b", grid=16)
    with torch.no_grad():
        logits = generator.logits(values["tokens"], values["classes"])
    torch.testing.assert_close(logits[:, ::17, ::97], values["logits_sub"], atol=1e-4, rtol=0)
    assert torch.equal(logits.argmax(-1), values["argmax"])


def original_shapes(size: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = LlamaGen(LlamaGenConfig.named(size))
    return {original_name(name): tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("name", "downsample"), [("vq16", 16), ("vq8", 8)])
def test_vq(name: str, downsample: int) -> None:
    values, metadata = golden(name)
    state = original_state(VQ(VQConfig(downsample=downsample)), metadata["salt"])
    tokenizer = load_tokenizer({"model": state})
    assert isinstance(tokenizer, VQ)
    assert tokenizer.config == VQConfig(downsample=downsample)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.latents(values["images"]), values["latents"], atol=1e-4, rtol=0)
        assert torch.equal(tokenizer.encode(values["images"]), values["indices"])
        torch.testing.assert_close(tokenizer.decode(values["indices"]), values["decoded"], atol=1e-4, rtol=0)
        decoded = tokenizer.decode(values["random_indices"])
    torch.testing.assert_close(decoded, values["decoded_random"], atol=1e-4, rtol=0)
