"""Janus-Pro against transformers' own model, and against what a generator has to be."""

import pickle
import sys
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import JanusForConditionalGeneration

from varpi.data import Dropped
from varpi.errors import VarpiError
from varpi.generators import Generator, concat_conditions, janus
from varpi.generators.janus import Janus, PromptCondition
from varpi.runtime.pretrained import Pretrained
from varpi.sampling.generate import generate

PROMPTS = ["a red cat", "the small blue dog sleeping on the moon .", "moon"]
TRAINABLE = ("language_model", "generation_embeddings", "generation_aligner", "generation_head")


@pytest.fixture(scope="module")
def model() -> Any:
    return hf.janus()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return hf.save(model, tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def generator(folder: Path) -> Janus:
    """Read only."""
    return hf.load(janus, hf.source(folder))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(64, (len(PROMPTS), hf.IMAGE_TOKENS))


def with_compat(folder: Path, **compat: bool) -> Janus:
    return hf.load(janus, hf.source(folder, **compat))


def test_is_a_pretrained_generator(generator: Janus) -> None:
    assert isinstance(generator, Generator)
    assert (generator.vocab_size, generator.grid, generator.num_tokens, generator.num_classes) == (64, 4, 16, None)
    assert len(generator.blocks) == 2


# -- against transformers


def test_greedy_tokens_with_guidance_are_those_of_transformers(model: Any, generator: Janus) -> None:
    texts = [f"<|User|>: {prompt}\n\n<|Assistant|>:<begin_of_image>" for prompt in PROMPTS]
    inputs = hf.text_tokenizer()(texts, padding=True, return_tensors="pt")
    assert (inputs["attention_mask"].sum(dim=1) == torch.tensor([10, 16, 8])).all()
    theirs = model.generate(**inputs, generation_mode="image", guidance_scale=5, do_sample=False)
    ours = generate(generator, PROMPTS, guidance_scale=5, greedy=True)
    assert torch.equal(ours, theirs)
    # Tokens that hardly varied would agree whatever the conditions and the cache.
    assert all(len(set(row)) > 5 for row in ours.tolist())
    assert len({tuple(row) for row in ours.tolist()}) == len(PROMPTS)
    assert (ours != generate(generator, PROMPTS, greedy=True)).float().mean() > 0.5


def test_a_prompt_is_the_dialogue_of_the_released_code(generator: Janus) -> None:
    texts = [f"<|User|>: {prompt}\n\n<|Assistant|>:<begin_of_image>" for prompt in PROMPTS]
    inputs = hf.text_tokenizer()(texts, padding=True, return_tensors="pt")
    condition = generator.prepare_condition([f"  {prompt}\n" for prompt in PROMPTS])
    assert torch.equal(condition.ids, inputs["input_ids"])
    assert torch.equal(condition.mask, inputs["attention_mask"].bool())
    beginning = [hf.IDS[word] for word in (hf.BOS, "<|User|>", ":", "moon", "\n\n", "<|Assistant|>", ":", hf.BOI)]
    assert condition.ids[2, -8:].tolist() == beginning


def test_saved_under_their_names_transformers_loads_it(model: Any, generator: Janus, tmp_path: Path) -> None:
    tensors = {generator.name_in_file(name): tensor for name, tensor in generator.state_dict().items()}
    save_file(
        {name: tensor for name, tensor in tensors.items() if name}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    generator.hf.config.from_dict(generator.hf_config).save_pretrained(tmp_path)
    again: Any = JanusForConditionalGeneration.from_pretrained(tmp_path)
    assert generator.hf_config["architectures"] == ["JanusForConditionalGeneration"]
    expected = model.state_dict()
    assert set(again.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_nothing_stays_on_the_meta_device(model: Any, generator: Janus) -> None:
    assert {tensor.device.type for tensor in (*generator.parameters(), *generator.buffers())} == {"cpu"}
    expected = dict(model.named_buffers())
    assert len(expected) == 3
    for name, buffer in generator.hf.named_buffers():
        assert torch.equal(buffer, expected[name]), name


# -- teacher forcing and cached generation


@pytest.mark.parametrize("static", [False, True])
def test_teacher_forcing_and_cached_steps_agree(generator: Janus, tokens: Tensor, static: bool) -> None:
    condition = generator.prepare_condition(PROMPTS)
    with torch.no_grad():
        whole = generator.logits(tokens, condition)
        cache = generator.new_cache(len(condition), static=static)
        steps = [generator.prefill(condition, cache)]
        steps += [generator.decode_step(tokens[:, i], torch.tensor(i), cache) for i in range(generator.num_tokens - 1)]
    assert whole.shape == (3, 16, 64)
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert whole.std() > 0.5


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_the_first_part_of_a_cache_goes_on_alone(generator: Janus, tokens: Tensor, static: bool) -> None:
    condition = generator.prepare_condition(PROMPTS)
    cache = generator.new_cache(3, static=static)
    generator.prefill(condition, cache)
    generator.decode_step(tokens[:, 0], torch.tensor(0), cache)
    part = cache.first(2)
    alone = generator.decode_step(tokens[:2, 1], torch.tensor(1), part)
    together = generator.decode_step(tokens[:, 1], torch.tensor(1), cache)
    torch.testing.assert_close(alone, together[:2], atol=1e-4, rtol=1e-4)
    assert torch.equal(part.keys[0], cache.keys[0][:2])


def test_a_row_does_not_depend_on_its_batch(generator: Janus, tokens: Tensor) -> None:
    condition = generator.prepare_condition(PROMPTS)
    dropped = generator.drop_condition(condition, torch.tensor([True, False, True]))
    with torch.no_grad():
        together, together_dropped = generator.logits(tokens, condition), generator.logits(tokens, dropped)
        for i, prompt in enumerate(PROMPTS):
            alone = generator.prepare_condition([prompt])
            assert bool(alone.mask.all())
            one = generator.logits(tokens[i : i + 1], alone)
            torch.testing.assert_close(together[i : i + 1], one, atol=1e-5, rtol=1e-5)
            alone = generator.drop_condition(alone, torch.tensor([i != 1]))
            one = generator.logits(tokens[i : i + 1], alone)
            torch.testing.assert_close(together_dropped[i : i + 1], one, atol=1e-5, rtol=1e-5)
    assert (together - together_dropped)[[0, 2]].abs().mean() > 0.1


def test_guided_tokens_do_not_depend_on_the_batch(generator: Janus) -> None:
    together = generate(generator, PROMPTS, guidance_scale=5, seed=1)
    one_by_one = generate(generator, PROMPTS, guidance_scale=5, seed=1, batch_size=1)
    assert torch.equal(together, one_by_one)


@pytest.mark.parametrize("shifted", [False, True])
def test_position_i_sees_only_tokens_before_i_unless_shifted(folder: Path, tokens: Tensor, shifted: bool) -> None:
    generator = with_compat(folder, shifted_logits=shifted)
    condition = generator.prepare_condition(PROMPTS)
    place = 6
    changed = tokens.clone()
    changed[:, place] = (tokens[:, place] + 1) % 64
    with torch.no_grad():
        difference = (generator.logits(changed, condition) - generator.logits(tokens, condition)).abs().amax(dim=(0, 2))
    first = place if shifted else place + 1
    assert difference[:first].max() == 0
    assert difference[first:].min() > 1e-3


@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_at_i_leaks_token_i_only_when_shifted(folder: Path, tokens: Tensor, shifted: bool) -> None:
    generator = with_compat(folder, shifted_logits=shifted)
    inputs: list[Tensor] = []

    def keep(module: object, arguments: object, output: Tensor) -> None:
        output.retain_grad()
        inputs.append(output)

    generator.hf.model.generation_aligner.register_forward_hook(keep)
    place = 6
    logits = generator.logits(tokens, generator.prepare_condition(PROMPTS))
    F.cross_entropy(logits[:, place], tokens[:, place]).backward()
    gradient = inputs[0].grad
    assert gradient is not None
    size = gradient.norm(dim=(0, 2))
    assert len(size) == (16 if shifted else 15)
    assert size[:place].min() > 0
    assert (size[place] > 0) == shifted
    assert size[place + 1 :].max() == 0


def test_shifted_logits_are_the_right_ones_a_place_late(folder: Path, generator: Janus, tokens: Tensor) -> None:
    shifted = with_compat(folder, shifted_logits=True)
    condition = generator.prepare_condition(PROMPTS)
    with torch.no_grad():
        right, late = generator.logits(tokens, condition), shifted.logits(tokens, condition)
    torch.testing.assert_close(late[:, :-1], right[:, 1:], atol=1e-5, rtol=1e-5)
    tokens_of = [generate(one, PROMPTS, greedy=True) for one in (generator, shifted)]
    assert torch.equal(*tokens_of)


def test_logits_are_float32_whatever_the_weights(folder: Path, tokens: Tensor) -> None:
    generator = with_compat(folder).to(torch.bfloat16)
    generator.reset_tables()
    condition = generator.prepare_condition(PROMPTS)
    cache = generator.new_cache(3)
    assert generator.logits(tokens, condition).dtype == torch.float32
    assert generator.prefill(condition, cache).dtype == torch.float32
    assert cache.keys[0].dtype == torch.bfloat16


def test_generates_under_autocast(generator: Janus) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        tokens = generate(generator, PROMPTS, guidance_scale=2, seed=0)
    assert tokens.shape == (3, 16)
    assert len(tokens.unique()) > 10


def test_one_prompt_of_one_token(generator: Janus, tokens: Tensor) -> None:
    condition = generator.prepare_condition([[hf.IDS[hf.BOI]]])
    cache = generator.new_cache(1)
    with torch.no_grad():
        steps = [generator.prefill(condition, cache), generator.decode_step(tokens[:1, 0], torch.tensor(0), cache)]
        whole = generator.logits(tokens[:1], condition)
    torch.testing.assert_close(torch.stack(steps, dim=1), whole[:, :2], atol=1e-4, rtol=1e-4)


# -- training


def test_what_generates_images_is_trained_and_nothing_else(folder: Path, tokens: Tensor) -> None:
    generator = with_compat(folder).train()
    logits = generator.logits(tokens, generator.prepare_condition(PROMPTS))
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in generator.hf.named_parameters():
        trained = name.startswith(tuple(f"model.{part}." for part in TRAINABLE))
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == trained, name


@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_changes_memory_only(folder: Path, tokens: Tensor, training: bool) -> None:
    gradients, passes = [], []
    for checkpointing in (False, True):
        generator = with_compat(folder).train(training)
        generator.gradient_checkpointing = checkpointing
        modes = []
        generator.hf.model.language_model.layers[1].self_attn.register_forward_hook(
            lambda module, _, __, seen=modes: seen.append(module.training)
        )
        logits = generator.logits(tokens, generator.prepare_condition(PROMPTS))
        assert [block.training for block in generator.blocks] == [training, training]
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        gradients.append({name: p.grad for name, p in generator.named_parameters() if p.grad is not None})
        passes.append(len(modes))
        assert set(modes) == {training}
    assert passes == [1, 2]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_gradient_checkpointing_needs_no_trained_embedding(folder: Path, tokens: Tensor) -> None:
    """As with adapters in the layers alone, when nothing that enters the first layer has a gradient."""
    generator = with_compat(folder).requires_grad_(False)
    generator.blocks.requires_grad_(True)
    generator.gradient_checkpointing = True
    generator.logits(tokens, generator.prepare_condition(PROMPTS)).logsumexp(-1).sum().backward()
    gradient = generator.hf.model.language_model.layers[0].mlp.up_proj.weight.grad
    assert gradient.abs().sum() > 0


def test_an_embedding_tied_to_the_output_layer_is_frozen(tmp_path: Path) -> None:
    folder = hf.save(hf.janus(tie_word_embeddings=True), tmp_path)
    source = hf.source(folder)
    assert "lm_head.weight" not in source.tensors
    generator = hf.load(janus, source)
    embedding = generator.hf.model.language_model.embed_tokens.weight
    assert generator.hf.lm_head.weight is embedding
    assert not embedding.requires_grad
    assert generator.blocks[0].mlp.up_proj.weight.requires_grad
    assert generator.name_in_file("hf.lm_head.weight") is None
    names = {generator.name_in_file(name) for name in generator.state_dict()} - {None}
    assert names == set(source.tensors)


def test_two_different_tables_are_not_tied_whatever_the_config_says(folder: Path) -> None:
    source = hf.source(folder)
    source.config["tie_word_embeddings"] = True
    generator = hf.load(janus, source)
    assert torch.equal(generator.hf.lm_head.weight, source.tensors["lm_head.weight"])
    assert generator.hf.model.language_model.embed_tokens.weight.requires_grad
    assert generator.hf_config["tie_word_embeddings"] is False


# -- conditions


def test_conditions_are_sliced_and_concatenated(generator: Janus) -> None:
    long, short = generator.prepare_condition(PROMPTS[1:2]), generator.prepare_condition(PROMPTS[2:])
    assert [condition.ids.shape[1] for condition in (long, short)] == [16, 8]
    for both, row in ((concat_conditions(long, short), 1), (concat_conditions(short, long), 0)):
        assert len(both) == 2
        assert both.ids[row].tolist() == [hf.IDS[hf.PAD]] * 8 + short.ids[0].tolist()
        assert both.mask[row].tolist() == [False] * 8 + [True] * 8
        assert both.ids[1 - row].tolist() == long.ids[0].tolist()
    part = concat_conditions(long, short)[torch.tensor([1])]
    assert (len(part), part.pad_id) == (1, hf.IDS[hf.PAD])
    assert generator.prepare_condition(part).ids.tolist() == part.ids.tolist()


def test_a_dropped_prompt_keeps_its_first_and_last_token(generator: Janus) -> None:
    condition = generator.prepare_condition(PROMPTS)
    dropped = generator.drop_condition(condition, torch.tensor([True, False, True]))
    pad = hf.IDS[hf.PAD]
    assert dropped.ids[0].tolist() == [pad] * 6 + [hf.IDS[hf.BOS]] + [pad] * 8 + [hf.IDS[hf.BOI]]
    assert dropped.ids[1].tolist() == condition.ids[1].tolist()
    assert dropped.ids[2].tolist() == [pad] * 8 + [hf.IDS[hf.BOS]] + [pad] * 6 + [hf.IDS[hf.BOI]]
    assert torch.equal(dropped.mask, condition.mask)


def test_attend_padding_is_the_all_ones_mask_of_the_released_code(
    folder: Path, generator: Janus, tokens: Tensor
) -> None:
    released = with_compat(folder, attend_padding=True)
    everywhere = torch.ones(3, dtype=torch.bool)
    condition = released.prepare_condition(PROMPTS)
    dropped = released.drop_condition(condition, everywhere)
    model = released.hf.model
    images = model.generation_aligner(model.generation_embeddings(tokens[:, :-1]))
    inputs = torch.cat([model.language_model.embed_tokens(dropped.ids), images], dim=1)
    hidden = model.language_model(inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2])).last_hidden_state
    with torch.no_grad():
        logits = released.logits(tokens, dropped)
        ours = generator.logits(tokens, generator.drop_condition(condition, everywhere))
    torch.testing.assert_close(logits, model.generation_head(hidden[:, -16:]), atol=1e-5, rtol=1e-5)
    longest = 1  # without padding on its left, so that it makes no difference
    torch.testing.assert_close(logits[longest], ours[longest], atol=1e-5, rtol=1e-5)
    assert (logits - ours)[[0, 2]].abs().mean() > 0.01
    assert not torch.equal(*(generate(one, PROMPTS, guidance_scale=5, greedy=True) for one in (released, generator)))
    assert torch.equal(*(generate(one, PROMPTS[:1], guidance_scale=5, greedy=True) for one in (released, generator)))


def test_token_ids_are_used_as_given_and_need_no_text_tokenizer(folder: Path) -> None:
    source = hf.source(folder)
    generator = hf.load(janus, Pretrained(source.where, source.tensors, {**source.config, "pad_token_id": 9}))
    condition = generator.prepare_condition([[1, 2, 3], [4]])
    assert condition.ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert condition.mask.tolist() == [[True, True, True], [False, False, True]]
    assert generator.prepare_condition(torch.tensor([[1, 2], [3, 4]])).ids.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (["a cat", " \n"], "prompt 1 is blank"),
        (["a cat", None], "prompt 1 is None; Janus-Pro reads captions"),
        ([torch.zeros(3, 8)], r"prompt 0 is tensor\(\[\[0., 0."),
        ([[]], r"prompt 0 is \[\]"),
        ([[1, 2.5]], r"prompt 0 is \[1, 2.5\]"),
        ("a cat", "prompts must be a list of captions, at least one, not 'a cat'"),
        ([], r"prompts must be a list of captions, at least one, not \[\]"),
        (7, "prompts must be a list of captions, at least one, not 7"),
        ([207, 360], "prompt 0 is the class id 207; Janus-Pro is conditioned on text"),
        (torch.tensor([3]), "prompt 0 is the class id 3"),
        (
            ["a cat", "the cat " * 13],
            "prompt 1 has 33 tokens; beside the 16 of an image 32 fit into this model's context",
        ),
        ([[1, 40]], "token id 40 is out of range: this model's text vocabulary has 40"),
        ([[1], [-1, 2]], "token id -1 is out of range"),
    ],
)
def test_prompts_that_are_refused(generator: Janus, condition: object, message: str) -> None:
    with pytest.raises(VarpiError, match=message) as caught:
        generator.prepare_condition(condition)
    assert "\n" not in str(caught.value)


def test_the_longest_prompt_that_fits(generator: Janus, tokens: Tensor) -> None:
    condition = generator.prepare_condition(["cat " * 25])
    assert condition.ids.shape == (1, 32)
    assert bool(generator.logits(tokens[:1], condition).isfinite().all())


def test_the_check_of_captions_knows_the_context(generator: Janus) -> None:
    check = pickle.loads(pickle.dumps(generator.caption_check))
    check("cat " * 25, "x:1")  # as many as fit
    with pytest.raises(VarpiError, match="prompt 0 has 33 tokens"):
        generator.prepare_condition(["cat " * 26])
    with pytest.raises(Dropped, match=r"^x:1: the caption 'cat cat.*'… makes 33 tokens; 32 fit into the context$"):
        check("cat " * 26, "x:1")


def test_captions_without_a_text_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    source = hf.source(folder)
    for where, said in ((None, "the checkpoint"), (tmp_path, str(tmp_path))):
        generator = hf.load(janus, Pretrained(source.where, source.tensors, source.config, where))
        with pytest.raises(VarpiError, match=f"captions need a text tokenizer, and {said} has no tokenizer.json"):
            generator.prepare_condition(["a cat"])
        with pytest.raises(VarpiError, match=rf"{said}: neither .* tells the id of '<｜▁pad▁｜>' \(pad_token_id\)"):
            generator.prepare_condition([[1, 2]])


def test_tokens_and_batches_that_do_not_fit_are_refused(generator: Janus, tokens: Tensor) -> None:
    condition = generator.prepare_condition(PROMPTS)
    with pytest.raises(VarpiError, match=r"tokens have shape \(3, 15\); 3 prompts and this generator's 4x4 grid need"):
        generator.logits(tokens[:, :-1], condition)
    with pytest.raises(VarpiError, match=r"tokens have shape \(3, 16\); 1 prompts"):
        generator.logits(tokens, condition[:1])
    with pytest.raises(VarpiError, match="3 prompts, but the cache is for 2"):
        generator.prefill(condition, generator.new_cache(2))


# -- checkpoints


def test_unknown_compat_settings_are_refused(folder: Path) -> None:
    with pytest.raises(
        VarpiError, match="Janus has no compat setting 'shift'; known are shifted_logits, attend_padding"
    ):
        janus.assemble(hf.source(folder, shift=True))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("model.generation_head.", r"has no image head \(model.generation_head.\*\), so it cannot generate images"),
        ("model.language_model.", r"has no language model \(model.language_model.\*\)"),
    ],
)
def test_other_models_are_refused(folder: Path, prefix: str, message: str) -> None:
    source = hf.source(folder)
    tensors = {name: tensor for name, tensor in source.tensors.items() if not name.startswith(prefix)}
    assert len(tensors) < len(source.tensors)
    with pytest.raises(VarpiError, match=message):
        janus.assemble(Pretrained("here", tensors, source.config))


def test_what_is_left_over_keeps_its_name(folder: Path) -> None:
    source = hf.source(folder)
    source.tensors["model.extra.weight"] = torch.zeros(1)
    generator, weights = janus.assemble(source)[:2]
    assert set(weights) - set(generator.state_dict()) == {"model.extra.weight"}


def test_the_image_tokenizer_decodes_as_transformers_and_compares_unit_vectors(
    model: Any, folder: Path, tokens: Tensor
) -> None:
    tokenizer = hf.fill(*janus.assemble_tokenizer(hf.source(folder))[:2])
    assert (tokenizer.codebook_size, tokenizer.downsample) == (64, 4)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode(tokens), model.model.vqmodel.decode(tokens), atol=1e-5, rtol=1e-5)
        latents = model.model.vqmodel.quant_conv(model.model.vqmodel.encoder(images.clone()))
        theirs = model.model.vqmodel.encode(images.clone()).image_tokens.view(3, 16)
    codes = F.normalize(model.model.vqmodel.quantize.embedding.weight, dim=-1)
    nearest = (F.normalize(latents, dim=1).flatten(2).transpose(1, 2) @ codes.T).argmax(-1)
    ours = tokenizer.encode(images)
    assert torch.equal(ours, nearest)
    assert len(ours.unique()) > 3
    assert (ours != theirs).float().mean() > 0.5


def test_a_checkpoint_without_its_image_tokenizer_is_refused(folder: Path) -> None:
    source = hf.source(folder)
    rest = {name: tensor for name, tensor in source.tensors.items() if "vqmodel" not in name}
    with pytest.raises(VarpiError, match="here: has no image tokenizer"):
        janus.assemble_tokenizer(Pretrained("here", rest, source.config))
    del source.tensors["model.vqmodel.quant_conv.weight"]
    with pytest.raises(VarpiError, match=r"is not a whole Janus checkpoint: quant_conv\.weight is missing"):
        janus.assemble_tokenizer(source)


def test_needs_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = hf.source(folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(VarpiError, match=r"this generator needs transformers: pip install 'varpi\[text\]'"):
        janus.assemble(source)


def test_a_condition_moves_between_devices() -> None:
    condition = PromptCondition(torch.tensor([[1, 2]]), torch.tensor([[False, True]]), 1).to("meta")
    assert (condition.ids.device.type, condition.mask.device.type, condition.pad_id) == ("meta", "meta", 1)
