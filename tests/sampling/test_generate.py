"""Generation: the cache against teacher forcing, guidance, filters, seeds, and refusals."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from golden import golden
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from varpi.errors import VarpiError
from varpi.generators import LlamaGen, LlamaGenConfig, TextCondition, llamagen
from varpi.objective.rollout import invert
from varpi.runtime.randomness import Stream, uniforms
from varpi.sampling.generate import filter_logits, generate, generate_rows, generate_with
from varpi.sampling.settings import Sampling


@pytest.fixture(scope="module")
def generator() -> LlamaGen:
    return lively(LlamaGen(LlamaGenConfig(dim=32, n_layer=2, n_head=2, vocab_size=24, grid=4, num_classes=5)))


def lively(generator: LlamaGen) -> LlamaGen:
    """Weights large enough for the condition and the past to matter."""
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream) / parameter.shape[-1] ** 0.5)
    return generator.train()


CLASSES = torch.tensor([0, 1, 2, 3, 4, 0, 1])


def cached_logits(generator: LlamaGen, tokens: Tensor, condition: Any, *, static: bool) -> Tensor:
    cache = generator.new_cache(len(tokens), static=static)
    logits = [generator.prefill(condition, cache)]
    for position in range(tokens.shape[1] - 1):
        logits.append(generator.decode_step(tokens[:, position], torch.tensor(position), cache))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_cached_decoding_equals_teacher_forcing(
    generator: LlamaGen, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamagen, "GROWTH", 3)
    tokens = torch.randint(24, (3, 16))
    generator.eval()
    expected = generator.logits(tokens, CLASSES[:3])
    cached = cached_logits(generator, tokens, CLASSES[:3], static=static)
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_static_step_is_one_graph_for_every_position(generator: LlamaGen) -> None:
    """Recorded once, its operations are right at all positions: the host never looks at the position."""
    tokens = torch.randint(24, (3, 16))
    generator.eval()
    cache = generator.new_cache(3, static=True)
    logits = [generator.prefill(CLASSES[:3], cache)]

    def step(tokens: Tensor, position: Tensor) -> Tensor:
        return generator.decode_step(tokens, position, cache)

    recorded = make_fx(step)(tokens[:, 0], torch.tensor(0))
    logits += [recorded(tokens[:, i], torch.tensor(i)) for i in range(15)]
    torch.testing.assert_close(torch.stack(logits, dim=1), generator.logits(tokens, CLASSES[:3]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_cached_decoding_equals_teacher_forcing_for_text(static: bool) -> None:
    config = LlamaGenConfig(32, 2, 2, vocab_size=24, grid=4, conditioning="text", condition_tokens=6, caption_dim=8)
    generator = lively(LlamaGen(config)).eval()
    mask = torch.tensor([[False] * 4 + [True] * 2, [True] * 6])
    condition = TextCondition(torch.randn(2, 6, 8) * mask[..., None], mask)
    tokens = torch.randint(24, (2, 16))
    expected = generator.logits(tokens, condition)
    cached = cached_logits(generator, tokens, condition, static=static)
    torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)
    together = generate(generator, condition, greedy=True, guidance_scale=3.0)
    apart = [generate(generator, condition[i : i + 1], greedy=True, guidance_scale=3.0) for i in range(2)]
    assert torch.equal(together, torch.cat(apart))


@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_the_guided_teacher_forced_logits(generator: LlamaGen) -> None:
    tokens = generate(generator, CLASSES, greedy=True, guidance_scale=2.5)
    generator.eval()
    conditional = generator.logits(tokens, CLASSES)
    null = generator.logits(tokens, torch.full_like(CLASSES, 5))
    assert torch.equal((null + 2.5 * (conditional - null)).argmax(-1), tokens)
    assert not torch.equal(conditional.argmax(-1), tokens)


def test_the_seed_decides_and_the_batch_size_does_not(generator: LlamaGen) -> None:
    tokens = generate(generator, CLASSES, seed=3)
    assert tokens.shape == (7, 16)
    assert tokens.dtype == torch.int64
    for batch_size in (1, 2, 7, 100):
        assert torch.equal(generate(generator, CLASSES, seed=3, batch_size=batch_size), tokens)
    assert not torch.equal(generate(generator, CLASSES, seed=4), tokens)
    assert not torch.equal(tokens[0], tokens[5])  # the same class, another image


def test_a_seed_leaves_the_global_random_state_alone(generator: LlamaGen) -> None:
    before = torch.get_rng_state()
    generate(generator, CLASSES, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(11)
    tokens = generate(generator, CLASSES)
    assert not torch.equal(generate(generator, CLASSES), tokens)
    torch.manual_seed(11)
    assert torch.equal(generate(generator, CLASSES), tokens)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_dropout_stays_out(generator: LlamaGen, training: bool) -> None:
    generator.train(training)
    tokens = generate(generator, CLASSES, seed=3)
    assert generator.training is training
    assert all(module.training is training for module in generator.modules())
    generator.train(not training)
    assert torch.equal(generate(generator, CLASSES, seed=3), tokens)
    with pytest.raises(VarpiError):
        generate(generator, torch.tensor([6]))
    assert generator.training is not training


def test_the_tokens_can_be_trained_on(generator: LlamaGen) -> None:
    tokens = generate(generator, CLASSES[:2], seed=0)
    generator.logits(tokens, CLASSES[:2]).square().mean().backward()
    assert generator.token_embedding.weight.grad is not None
    generator.zero_grad(set_to_none=True)


def test_only_guidance_doubles_the_batch(generator: LlamaGen, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    new_cache = generator.new_cache
    monkeypatch.setattr(generator, "new_cache", lambda size, static: (sizes.append(size), new_cache(size))[1])
    generate(generator, CLASSES, seed=0, batch_size=3)
    generate(generator, CLASSES, seed=0, batch_size=3, guidance_scale=0.5)
    assert sizes == [3, 3, 1] * 2
    generate(generator, CLASSES, seed=0, batch_size=3, guidance_scale=1.5)
    assert sizes[6:] == [6, 6, 2]


def test_the_unconditional_half_ends_with_guidance(generator: LlamaGen, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it would go on to compute is asked for by nobody: the tokens are those of both halves fed to the end."""
    sizes: list[int] = []
    step = generator.decode_step
    monkeypatch.setattr(generator, "decode_step", lambda *given: (sizes.append(len(given[0])), step(*given))[1])
    tokens = generate(generator, CLASSES[:3], greedy=True, guidance_scale=3.0, guidance_interval=4)
    assert sizes == [6] * 5 + [3] * 10  # after the first token five more under guidance
    generator.eval()
    with torch.no_grad():
        conditional = generator.logits(tokens, CLASSES[:3])
        null = generator.logits(tokens, torch.full((3,), 5))
    guided = torch.cat([(null + 3 * (conditional - null))[:, :6], conditional[:, 6:]], dim=1)
    assert torch.equal(guided.argmax(-1), tokens)
    assert not torch.equal(conditional.argmax(-1), tokens)


def test_a_recorded_step_is_replayed_at_every_position(generator: LlamaGen, monkeypatch: pytest.MonkeyPatch) -> None:
    """With operations recorded as a CUDA graph records them: fixed, on the same memory, into the same memory."""
    recorded: list[int] = []

    def record(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorded.append(len(function()))
        operations = make_fx(function)()
        result = operations()

        def replay() -> None:
            result.copy_(operations())

        return replay, result

    monkeypatch.setattr("varpi.sampling.graph.record", record)
    monkeypatch.setattr(LlamaGen, "device", torch.device("cuda"))
    monkeypatch.setattr(generator, "prepare_condition", lambda condition: condition)
    settings: dict[str, Any] = {"guidance_scale": 3.0, "guidance_interval": 4}
    more: list[dict[str, Any]] = [{"greedy": True}, {"seed": 5}]
    for chosen in more:
        tokens = generate(generator, CLASSES[:3], graph=True, **settings, **chosen)
        assert torch.equal(generate(generator, CLASSES[:3], **settings, **chosen), tokens)
    assert recorded == [6, 3] * 2  # under guidance, and after it


def test_a_graph_is_for_a_gpu(generator: LlamaGen) -> None:
    with pytest.raises(VarpiError, match="a CUDA graph needs a generator on one GPU"):
        generate(generator, CLASSES, graph=True)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk20", {"top_k": 20}),
        ("topk50_topp0.9", {"top_k": 50, "top_p": 0.9}),
        ("topp0.7_t0.8", {"top_p": 0.7, "temperature": 0.8}),
    ],
)
def test_filters_equal_the_original(name: str, settings: dict) -> None:
    values, _ = golden("llamagen_c2i_small")
    probabilities = filter_logits(values["probs.logits"], Sampling(**settings))
    torch.testing.assert_close(probabilities, values[f"probs.{name}"], atol=1e-6, rtol=0)
    assert torch.equal(probabilities == 0, values[f"probs.{name}"] == 0)


def test_filters_worked_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    torch.testing.assert_close(filter_logits(logits, Sampling()), torch.tensor([[0.5, 0.25, 0.15, 0.1]]))
    torch.testing.assert_close(filter_logits(logits, Sampling(top_k=2)), torch.tensor([[2 / 3, 1 / 3, 0, 0]]))
    torch.testing.assert_close(filter_logits(logits, Sampling(top_k=99)), logits.exp())
    torch.testing.assert_close(filter_logits(logits, Sampling(top_p=0.6)), torch.tensor([[2 / 3, 1 / 3, 0, 0]]))
    torch.testing.assert_close(filter_logits(logits, Sampling(top_p=0.1)), torch.tensor([[1.0, 0, 0, 0]]))
    squares = torch.tensor([[0.25, 0.0625, 0.0225, 0.01]])
    torch.testing.assert_close(filter_logits(logits, Sampling(temperature=0.5)), squares / squares.sum())


def test_top_p_goes_on_until_the_sum_exceeds_it() -> None:
    """As LlamaGen's filter: a sum that equals p exactly does not end the choice."""
    kept = filter_logits(torch.zeros(1, 4), Sampling(top_p=0.5))  # sums .25, .5, .75
    assert sorted(kept[0].tolist()) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])


def test_draws_are_those_of_the_stream_of_generation(generator: LlamaGen) -> None:
    """A training step draws from other streams, so that a run never samples what it was trained on."""
    tokens = generate(generator, CLASSES, seed=11, first=5)
    generator.eval()
    draws = uniforms(11, 0, range(5, 5 + len(CLASSES)), (16,), stream=Stream.GENERATION)
    with torch.no_grad():
        probabilities = generator.logits(tokens, CLASSES).softmax(-1)
    assert torch.equal(invert(probabilities.flatten(0, 1), draws.reshape(-1, 1)).view_as(tokens), tokens)


def test_sampled_frequencies_match_the_probabilities(generator: LlamaGen) -> None:
    classes = torch.zeros(4000, dtype=torch.int64)
    first = generate(generator, classes, seed=0, temperature=1.3, top_k=10, batch_size=2000)[:, 0]
    generator.eval()
    with torch.no_grad():
        logits = generator.prefill(classes[:1], generator.new_cache(1))
    expected = filter_logits(logits, Sampling(temperature=1.3, top_k=10))[0]
    observed = first.bincount(minlength=24) / 4000
    assert (observed[expected == 0] == 0).all()
    assert (observed - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; it must be at least 0"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"first": -1}, "first is -1; it must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(generator: LlamaGen, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        generate(generator, CLASSES, **settings)


def test_every_setting_is_an_argument_of_generate_and_arrives(generator: LlamaGen) -> None:
    parameters = inspect.signature(generate).parameters
    for setting in fields(Sampling):
        assert parameters[setting.name].default == setting.default
    settings = {"guidance_scale": 3.0, "guidance_interval": 6, "guidance_schedule": "power-cosine"}
    settings |= {"guidance_power": 1.5, "temperature": 1.4, "top_k": 9, "top_p": 0.8, "seed": 4}
    tokens = generate(generator, CLASSES, **settings)
    assert torch.equal(tokens, generate_with(generator, CLASSES, Sampling(**settings)))
    for name in settings:  # none is ignored
        plain = {key: value for key, value in settings.items() if key != name}
        if name != "seed":
            assert not torch.equal(generate(generator, CLASSES, **plain), tokens), name


@pytest.mark.parametrize("ids", [[6], [-1], [0, 9]])
def test_class_ids_out_of_range_are_refused(generator: LlamaGen, ids: list[int]) -> None:
    with pytest.raises(VarpiError, match=r"class id -?\d is out of range: this generator knows 0 to 4"):
        generate(generator, torch.tensor(ids))


def test_weights_that_give_nan_are_reported() -> None:
    generator = lively(LlamaGen(LlamaGenConfig(dim=32, n_layer=1, n_head=2, vocab_size=24, grid=4, num_classes=5)))
    with torch.no_grad():
        generator.norm.weight[0] = float("nan")
    with pytest.raises(VarpiError, match="logits are not finite"):
        generate(generator, CLASSES, seed=0)


def test_progress_goes_to_stderr(generator: LlamaGen, capsys: pytest.CaptureFixture[str]) -> None:
    generate(generator, CLASSES, seed=0, progress=True)
    captured = capsys.readouterr()
    assert "generating" in captured.err
    assert "100%" in captured.err
    assert captured.out == ""
    generate(generator, CLASSES, seed=0)
    assert capsys.readouterr().err == ""


def test_draws_in_place_of_a_seed(generator: LlamaGen) -> None:
    draws = uniforms(3, 0, range(7), (16,), stream=Stream.GENERATION)
    expected = generate(generator, CLASSES, seed=3)
    assert torch.equal(generate_with(generator, CLASSES, Sampling(), draws=draws, batch_size=3), expected)
    with pytest.raises(VarpiError, match=r"draws have shape \(6, 16\); \(7, 16\) is needed"):
        generate_with(generator, CLASSES, Sampling(), draws=draws[1:])


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_rows_are_what_generate_draws_and_two_iterators_do_not_mix(generator: LlamaGen, guidance_scale: float) -> None:
    settings = [Sampling(guidance_scale=guidance_scale, seed=seed) for seed in (3, 4)]
    expected = [generate_with(generator, CLASSES, one) for one in settings]
    generator.eval()
    try:
        both = list(zip(*(generate_rows(generator, CLASSES, one) for one in settings), strict=True))
    finally:
        generator.train()
    assert [rows.shape for rows, _ in both] == [(7, 4), (7, 8), (7, 12), (7, 16)]
    for one, tokens in enumerate(expected):
        for row, rows in enumerate(both, 1):
            assert torch.equal(rows[one], tokens[:, : 4 * row])


def test_rows_that_nobody_asks_for_are_not_drawn(generator: LlamaGen, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = generator.decode_step
    monkeypatch.setattr(generator, "decode_step", lambda *given: (steps.append(1), step(*given))[1])
    generator.eval()
    try:
        rows = generate_rows(generator, CLASSES, Sampling(seed=0))
        next(rows)
        rows.close()
    finally:
        generator.train()
    assert len(steps) == 3
    assert list(rows) == []


def test_rows_need_a_seed_and_eval_mode(generator: LlamaGen) -> None:
    with pytest.raises(VarpiError, match="in eval mode and a seed"):
        next(generate_rows(generator, CLASSES, Sampling(seed=0)))
    generator.eval()
    with pytest.raises(VarpiError, match="in eval mode and a seed"):
        next(generate_rows(generator, CLASSES, Sampling()))
    generator.train()
