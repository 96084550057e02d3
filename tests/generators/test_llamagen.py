"""LlamaGen against the golden outputs of the original, its weights loaded as any foreign checkpoint."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from golden import config_of, fill, golden, original_state
from torch import Tensor

from varpi.generators import LlamaGen, LlamaGenConfig, TextCondition
from varpi.generators.llamagen import attend, attend_once, rotary_table, rotate
from varpi.generators.llamagen_files import original_name
from varpi.sampling.generate import generate
from varpi.weights import load_generator, to_original

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


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16_is_the_fused_one(masked: bool) -> None:
    """Where a gradient is needed on a CPU, other operations compute it; the rounding of bfloat16 is 2**-8."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(2, 3, 10, 8, generator=generator).bfloat16() for _ in range(4))
    mask = torch.rand(2, 1, 10, 10, generator=generator) < 0.5 if masked else None
    if mask is not None:
        mask |= torch.eye(10, dtype=torch.bool)
    outputs, gradients = [], []
    for attention in (attend, F.scaled_dot_product_attention):
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        arguments = (mask,) if attention is attend else (mask, 0.0, mask is None)
        outputs.append(attention(*inputs, *arguments))
        assert ("Scaled" in type(outputs[-1].grad_fn).__name__) == (attention is not attend)
        gradients.append(torch.autograd.grad(outputs[-1], inputs, upstream))
    torch.testing.assert_close(*outputs, atol=0.02, rtol=0.02)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=0.05, rtol=0.02)


def test_caption_features_are_padded_on_the_left() -> None:
    config = LlamaGenConfig(32, 2, 2, vocab_size=24, grid=4, conditioning="text", condition_tokens=5, caption_dim=3)
    short, whole = torch.arange(6.0).view(2, 3), torch.ones(5, 3)
    condition = LlamaGen(config).prepare_condition([short, whole])
    torch.testing.assert_close(condition.features[0], torch.cat([torch.zeros(3, 3), short]))
    torch.testing.assert_close(condition.features[1], whole)
    assert condition.mask.tolist() == [[False, False, False, True, True], [True] * 5]


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


@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_query_equals_the_general_one(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8)
    mask = torch.tensor([[True] * 9, [True] * 4 + [False] * 5, [False] * 3 + [True] * 6])[:, None, None]
    mask = mask if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    keys, values = (F.pad(x, (0, 0, 0, 4), value=7.0) for x in (k, v))  # what is not written yet
    torch.testing.assert_close(attend_once(q, keys, values, 9, mask), expected, atol=1e-6, rtol=1e-5)
    low = attend_once(q.bfloat16(), keys.bfloat16(), values.bfloat16(), 9, mask)
    torch.testing.assert_close(low.float(), expected, atol=3e-2, rtol=0)


def test_a_rotation_is_the_same_where_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    table = rotary_table(LlamaGenConfig(32, 2, 2, vocab_size=24, grid=4))
    qkv = torch.randn(3, 17, 3, 2, 16, requires_grad=True)
    gradients, turned = [], []
    for compiled in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiled=compiled: compiled)
        turned.append(rotate(qkv[:, :, :2], table))
        gradients += torch.autograd.grad(turned[-1].square().sum(), qkv)
    assert torch.equal(*turned)
    assert torch.equal(*gradients)
    angle = turned[0][0, 2, 0, 0, 8:10] @ qkv[0, 2, 0, 0, 8:10].detach()  # grid place 1: one column on, by one radian
    assert angle.item() == pytest.approx(qkv[0, 2, 0, 0, 8:10].square().sum().item() * 0.5403023, rel=1e-5)


@torch.no_grad()
def test_cached_steps_in_bfloat16_are_near_the_whole_pass(c2i: tuple[LlamaGen, dict[str, Tensor]]) -> None:
    generator = copy.deepcopy(c2i[0]).to(torch.bfloat16).eval()
    generator.reset_tables()
    tokens, classes = torch.randint(generator.vocab_size, (2, generator.num_tokens)), torch.tensor([0, 1])
    cache = generator.new_cache(2)
    steps = [generator.prefill(classes, cache)]
    steps += [generator.decode_step(tokens[:, i], torch.tensor(i), cache) for i in range(generator.num_tokens - 1)]
    cached, whole = torch.stack(steps, dim=1), generator.logits(tokens, classes)
    assert torch.corrcoef(torch.stack([cached.flatten(), whole.flatten()]))[0, 1] > 0.999
