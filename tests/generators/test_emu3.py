"""Emu3 at toy size: against transformers' own classes, through the public functions, and refused where it must be."""

import json
import pickle
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from training_runs import quiet
from transformers import (
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    PreTrainedTokenizerFast,
)

import varpi
from varpi.data import Dropped
from varpi.errors import VarpiError
from varpi.generators import Generator
from varpi.generators.emu3 import config_for
from varpi.recipe import Recipe, parse_recipe
from varpi.tokenizers import Tokenizer as ImageTokenizer
from varpi.weights.lora import add_adapters

GRID, CODES, SIZE = 4, 24, 16
WORDS = ["[UNK]", "a", "the", "red", "blue", "cat", "dog", "moon", "on", "under", "small", "4", "*"]
BOS, EOS, PAD = "<|extra_203|>", "<|extra_204|>", "<|endoftext|>"
LOOKS = {
    "image_token": "<image>",
    "boi_token": "<|image start|>",
    "eoi_token": "<|image end|>",
    "image_wrapper_token": "<|image token|>",
    "eof_token": "<|extra_201|>",
}
SPECIAL = [BOS, EOS, PAD, *LOOKS.values(), "<|extra_200|>"]
VISUAL = [f"<|visual token {code:06d}|>" for code in range(CODES)]
VOCABULARY = {word: i for i, word in enumerate([*WORDS, *SPECIAL, *reversed(VISUAL)])}
CODE_IDS = torch.tensor([VOCABULARY[name] for name in VISUAL])
EOL = VOCABULARY["<|extra_200|>"]
CAPTIONS = ["a red cat", "the small blue dog on the moon", "moon"]


def text_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([*SPECIAL, *reversed(VISUAL)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens=LOOKS,
    )


def config(**changes: Any) -> Emu3Config:
    settings: dict[str, Any] = {
        "text_config": {
            "vocab_size": len(VOCABULARY) + 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 40,
            "bos_token_id": VOCABULARY[BOS],
            "eos_token_id": VOCABULARY[EOS],
            "pad_token_id": VOCABULARY[PAD],
        },
        "vq_config": {
            "codebook_size": CODES,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [2],
            "hidden_size": 32,
        },
        "vocabulary_map": VOCABULARY,
        "varpi_grid": GRID,
    }
    return Emu3Config(**{**settings, **changes})


def make(folder: Path, **changes: Any) -> Emu3ForConditionalGeneration:
    """Random, with weights so large that every token depends on the prompt and on those before it; saved there."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Emu3ForConditionalGeneration(config(**changes)).eval()
        for name, parameter in model.named_parameters():
            if "vqmodel" not in name and parameter.ndim > 1:
                nn.init.normal_(parameter, std=1.0 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5)
        nn.init.normal_(model.model.vqmodel.quantize.embedding.weight, std=0.3)
    model.save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` writes of model and tokenizer. Read only."""
    path = tmp_path_factory.mktemp("emu3")
    make(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return Emu3ForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture
def generator(folder: Path) -> Any:
    return varpi.load_generator(folder)


def codes(count: int = len(CAPTIONS), seed: int = 0) -> Tensor:
    return torch.randint(CODES, (count, GRID * GRID), generator=torch.Generator().manual_seed(seed))


def prompt_ids(caption: str) -> list[int]:
    words = [*caption.split(), LOOKS["boi_token"], "4", "*", "4", LOOKS["image_wrapper_token"]]
    return [VOCABULARY[word] for word in [BOS, *words]]


@torch.no_grad()
def their_logits(model: Any, prompts: Iterable[list[int]], tokens: Tensor) -> Tensor:
    """Transformers' own pass over each whole sequence by itself, ends of lines and all: (B,N,V)."""
    logits = []
    for prompt, image in zip(prompts, tokens, strict=True):
        rows = model.vocabulary_mapping.convert_img2bpe(image.view(GRID, GRID)).flatten()
        sequence = torch.cat([torch.tensor(prompt), rows])
        predicted = model(input_ids=sequence[None]).logits[0, :-1]
        of_codes = torch.isin(sequence[1:], CODE_IDS)
        logits.append(predicted[of_codes][:, CODE_IDS])
    return torch.stack(logits)


@torch.no_grad()
def cached_logits(generator: Any, tokens: Tensor, condition: Any) -> Tensor:
    cache = generator.new_cache(len(tokens))
    logits = [generator.prefill(condition, cache)]
    logits += [generator.decode_step(tokens[:, i], torch.tensor(i), cache) for i in range(tokens.shape[1] - 1)]
    return torch.stack(logits, dim=1)


def close(one: Tensor, other: Tensor, atol: float) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# -- against transformers


def test_it_meets_the_protocols(folder: Path, generator: Any) -> None:
    assert isinstance(generator, Generator)
    assert (generator.grid, generator.num_tokens, generator.vocab_size, generator.num_classes) == (4, 16, 24, None)
    tokenizer = varpi.load_tokenizer(folder)
    assert isinstance(tokenizer, ImageTokenizer)
    assert (tokenizer.codebook_size, tokenizer.downsample) == (24, 4)


def test_prompts_are_those_of_their_processor(generator: Any) -> None:
    processor: Any = Emu3Processor(Emu3ImageProcessor(), text_tokenizer())
    expected = processor(
        text=CAPTIONS, return_for_image_generation=True, image_area=32 * 32, padding=True, return_tensors="pt"
    )
    condition = generator.prepare_condition(CAPTIONS)
    assert torch.equal(condition.ids, expected["input_ids"])
    assert torch.equal(condition.mask.long(), expected["attention_mask"])
    assert condition.ids[1].tolist() == prompt_ids(CAPTIONS[1])


@torch.no_grad()
def test_logits_are_theirs(generator: Any, theirs: Any) -> None:
    expected = their_logits(theirs, map(prompt_ids, CAPTIONS), codes())
    assert expected.std() > 0.5
    close(generator.logits(codes(), generator.prepare_condition(CAPTIONS)), expected, 1e-5)
    close(generator.logits(codes(1), generator.prepare_condition(CAPTIONS[:1])), expected[:1], 1e-5)  # without padding


@torch.no_grad()
def test_cached_decoding_equals_teacher_forcing(generator: Any) -> None:
    condition = generator.prepare_condition(CAPTIONS)
    close(cached_logits(generator, codes(), condition), generator.logits(codes(), condition), 1e-4)


@torch.no_grad()
def test_a_position_sees_only_what_comes_before(generator: Any) -> None:
    condition, tokens = generator.prepare_condition(CAPTIONS), codes()
    changed = tokens.clone()
    changed[:, 5] = (tokens[:, 5] + 1) % CODES
    before, after = generator.logits(tokens, condition), generator.logits(changed, condition)
    close(before[:, :6], after[:, :6], 1e-6)
    assert ((before - after)[:, 6:].abs().amax(dim=-1) > 1e-3).all()


@torch.no_grad()
def test_greedy_generation_is_a_plain_loop_over_their_model(generator: Any, theirs: Any) -> None:
    for caption, found in zip(CAPTIONS, varpi.generate(generator, CAPTIONS, greedy=True), strict=True):
        sequence, image = prompt_ids(caption), []
        for i in range(GRID * GRID):
            if i and i % GRID == 0:
                sequence.append(EOL)
            best = theirs(input_ids=torch.tensor([sequence])).logits[0, -1, CODE_IDS].argmax()
            image.append(int(best))
            sequence.append(int(CODE_IDS[best]))
        assert found.tolist() == image


@torch.no_grad()
def test_dropping_leaves_the_prompt_of_an_empty_caption(generator: Any, theirs: Any) -> None:
    condition = generator.prepare_condition(CAPTIONS)
    dropped = generator.drop_condition(condition, torch.tensor([True, False, True]))
    empty = prompt_ids("")
    pads = condition.ids.shape[1] - len(empty)
    for i in (0, 2):
        assert dropped.ids[i].tolist() == [VOCABULARY[PAD]] * pads + empty
        assert dropped.mask[i].tolist() == [False] * pads + [True] * len(empty)
    assert torch.equal(dropped.ids[1], condition.ids[1])
    assert dropped.mask[1].all()
    close(
        generator.logits(codes(), dropped),
        their_logits(theirs, [empty, prompt_ids(CAPTIONS[1]), empty], codes()),
        1e-5,
    )


@torch.no_grad()
def test_guided_generation_is_the_argmax_of_the_guided_logits(generator: Any) -> None:
    tokens = varpi.generate(generator, CAPTIONS, greedy=True, guidance_scale=2.0)
    condition = generator.prepare_condition(CAPTIONS)
    conditional = generator.logits(tokens, condition)
    null = generator.logits(tokens, generator.drop_condition(condition, torch.tensor([True] * 3)))
    assert torch.equal((null + 2.0 * (conditional - null)).argmax(-1), tokens)
    assert not torch.equal(conditional.argmax(-1), tokens)


@torch.no_grad()
def test_the_image_tokenizer_is_theirs(folder: Path, theirs: Any) -> None:
    tokenizer = varpi.load_tokenizer(folder)
    images = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    tokens = tokenizer.encode(images)
    expected = theirs.model.vqmodel.encode(images, torch.tensor([[SIZE, SIZE]] * 3)).image_tokens
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, torch.stack(expected).flatten(1))
    assert len(tokens.unique()) > 3
    decoded = tokenizer.decode(tokens)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, theirs.model.vqmodel.decode(tokens.view(3, GRID, GRID)))


# -- training


def test_the_language_model_learns_and_the_image_tokenizer_does_not(generator: Any) -> None:
    frozen = {name for name, parameter in generator.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in generator.named_parameters() if ".vqmodel." in name}


@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing_changes_no_gradient(generator: Any, training: bool) -> None:
    condition = generator.prepare_condition(CAPTIONS)
    gradients, passes = [], []
    generator.blocks[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    for on in (False, True):
        generator.train(training).zero_grad()
        generator.gradient_checkpointing = on
        torch.manual_seed(3)
        generator.logits(codes(), condition).square().mean().backward()
        gradients.append({name: p.grad for name, p in generator.named_parameters() if p.requires_grad})
    assert len(passes) == 3  # once, and once more in the backward pass
    for name, gradient in gradients[0].items():
        close(gradient, gradients[1][name], 1e-6)
        assert gradient.abs().max() > 0


@torch.no_grad()
def test_the_modules_rule_all_dropout(generator: Any) -> None:
    condition = generator.prepare_condition(CAPTIONS)
    expected = generator.logits(codes(), condition)
    generator.train()
    assert (generator.logits(codes(), condition) - expected).abs().max() > 0.1  # 0.1 is what the configuration says
    for module in generator.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    close(generator.logits(codes(), condition), expected, 1e-6)


def recipe(folder: Path, data: Path, **sections: Any) -> Recipe:
    """Four images whose captions are in a parquet file, two steps."""
    draws = torch.Generator().manual_seed(4)
    images = torch.randint(256, (4, SIZE, SIZE, 3), generator=draws, dtype=torch.uint8)
    rows = {
        "image": [Image.fromarray(image.numpy()) for image in images],
        "caption": [*CAPTIONS, "a small cat under the moon"],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(data)
    va_pi = {"name": "va_pi", "group_size": 2, "context_noise": 0.2, "condition_drop": 0.5}
    values: dict[str, Any] = {
        "method": va_pi | {"reward": {"perceptual_weight": 0}},
        "generator": {"source": str(folder)},
        "tokenizer": {"source": str(folder)},
        "data": {"source": str(data), "image_size": SIZE, "caption_column": "caption"},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 2, "batch_size": 4},
    }
    return parse_recipe(values | sections)


@torch.no_grad()
def test_a_run_leaves_a_model_for_transformers(folder: Path, tmp_path: Path) -> None:
    with torch.enable_grad():
        run = quiet(recipe(folder, tmp_path / "data.parquet"), tmp_path / "run")
    before, after = load_file(folder / "model.safetensors"), load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith("text_model.")}

    trained: Any = varpi.load_generator(run)
    assert trained.grid == GRID
    tokens = varpi.generate(trained, CAPTIONS, seed=5, guidance_scale=2.0)
    assert varpi.load_tokenizer(run).decode(tokens).shape == (3, 3, SIZE, SIZE)
    theirs: Any
    theirs, info = Emu3ForConditionalGeneration.from_pretrained(run, output_loading_info=True)  # pyright: ignore
    assert not any(info.values())
    logits = trained.logits(tokens, trained.prepare_condition(CAPTIONS))
    close(logits, their_logits(theirs.eval(), map(prompt_ids, CAPTIONS), tokens), 1e-5)


def test_a_tied_output_layer_stays_tied(tmp_path: Path) -> None:
    make(tmp_path / "tied", tie_word_embeddings=True)
    run = quiet(recipe(tmp_path / "tied", tmp_path / "data.parquet"), tmp_path / "run")
    names = load_file(run / "model.safetensors").keys()
    assert "text_model.model.embed_tokens.weight" in names
    assert "text_model.lm_head.weight" not in names
    trained: Any = varpi.load_generator(run)
    assert trained.hf.lm_head.weight is trained.hf.model.text_model.embed_tokens.weight
    theirs = Emu3ForConditionalGeneration.from_pretrained(run).eval()
    expected = their_logits(theirs, map(prompt_ids, CAPTIONS), codes())
    with torch.no_grad():
        close(trained.logits(codes(), trained.prepare_condition(CAPTIONS)), expected, 1e-4)


def test_two_tables_are_not_tied_whatever_the_configuration_says(folder: Path, tmp_path: Path) -> None:
    source = altered(folder, tmp_path, tie_word_embeddings=True)
    generator: Any = varpi.load_generator(source)
    theirs = Emu3ForConditionalGeneration.from_pretrained(source)
    assert torch.equal(generator.hf.lm_head.weight, theirs.lm_head.weight)
    assert not torch.equal(generator.hf.lm_head.weight, generator.hf.model.text_model.embed_tokens.weight)
    assert generator.hf_config["tie_word_embeddings"] is False


@torch.no_grad()
def test_adapters_are_merged_under_their_names(folder: Path, generator: Any, tmp_path: Path) -> None:
    add_adapters(generator, rank=2, alpha=4.0, targets=["q_proj", "down_proj"])
    for name, parameter in generator.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    varpi.save_generator(generator, tmp_path / "model.safetensors")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert moved == {name for name in before if re.search(r"layers.*(q|down)_proj", name)}
    merged: Any = varpi.load_generator(tmp_path)
    condition = merged.prepare_condition(CAPTIONS)
    close(merged.logits(codes(), condition), generator.logits(codes(), condition), 1e-5)


# -- files


def test_both_layouts_of_names_load(folder: Path, generator: Any, tmp_path: Path) -> None:
    now = {"text_model.lm_head.": "lm_head.", "text_model.model.": "model.text_model.", "vqmodel.": "model.vqmodel."}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next(prefix for prefix in now if name.startswith(prefix))
        tensors[now[old] + name.removeprefix(old)] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    loaded: Any = varpi.load_generator(tmp_path)
    expected = generator.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert varpi.load_tokenizer(tmp_path).codebook_size == CODES  # pyright: ignore


def test_an_export_is_what_was_read(folder: Path, generator: Any, tmp_path: Path) -> None:
    varpi.export_original(generator, tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["varpi_grid"] == GRID
    assert "dtype" not in said
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_the_released_shape() -> None:
    made: Any = config_for("emu3-gen")
    ids = made.vocabulary_map
    assert ids["<|visual token 032767|>"] == made.text_config.vocab_size - 1 == 184621
    assert made.text_config.max_position_embeddings == 9216
    assert made.vq_config.codebook_size == 32768


def test_weights_alone_with_a_name_are_those_of_the_released_shape(folder: Path) -> None:
    with pytest.raises(VarpiError, match=r"does not fit its configuration: .*missing"):
        varpi.load_generator(load_file(folder / "model.safetensors"), architecture="emu3-gen")


# -- refusals


def altered(folder: Path, path: Path, **changes: Any) -> Path:
    """The checkpoint without its text tokenizer, and with another config.json."""
    said = json.loads((folder / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not None}))
    (path / "model.safetensors").symlink_to(folder / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (torch.tensor([3, 4]), r"prompt 0 is of type Tensor; Emu3 is conditioned on text: give captions"),
        ([207], "prompt 0 is of type int; Emu3 is conditioned on text"),
        ([torch.zeros(2, 8)], "prompt 0 is of type Tensor; Emu3 is conditioned on text"),
        ("a cat", "must be a list of captions, at least one, not 'a cat'"),
        ([], "must be a list of captions, at least one"),
        (["cat", "cat " * 17], "prompt 1 has 23 tokens; beside the 18 of an image 22 fit into this model's context"),
    ],
)
def test_conditions_that_are_refused(generator: Any, condition: Any, message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        generator.prepare_condition(condition)


def test_captions_need_a_text_tokenizer(folder: Path, tmp_path: Path) -> None:
    generator = varpi.load_generator(altered(folder, tmp_path))
    with pytest.raises(VarpiError, match=r"captions need a text tokenizer, and .* has no tokenizer\.json"):
        varpi.generate(generator, CAPTIONS)


def test_the_grid_is_that_of_the_release_unless_said(folder: Path, tmp_path: Path) -> None:
    generator = varpi.load_generator(altered(folder, tmp_path, varpi_grid=None))
    assert (generator.grid, generator.num_tokens) == (90, 8100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"varpi_grid": 0}, "varpi_grid 0; it must be an integer from 1 to 1024"),
        ({"varpi_grid": 10**6}, "varpi_grid 1000000; it must be"),
        ({"varpi_grid": "4"}, "varpi_grid '4'; it must be an integer from 1 to 1024"),
        ({"vocabulary_map": None}, r"vocabulary_map has no '<\|extra_200\|>'"),
        (
            {"vocabulary_map": {k: v for k, v in VOCABULARY.items() if k != VISUAL[7]}},
            r"vocabulary_map has no '<\|visual token 000007\|>'",
        ),
        ({"text_config": {"hidden_size": "wide"}}, "config.json does not describe an Emu3 model"),
    ],
)
def test_configurations_that_are_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = altered(folder, tmp_path, **changes)
    for load in (varpi.load_generator, varpi.load_tokenizer):
        with pytest.raises(VarpiError, match=message):
            load(source)


def test_checkpoints_and_settings_that_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    source = altered(folder, tmp_path)
    source.joinpath("model.safetensors").unlink()
    save_file({n: t for n, t in tensors.items() if n.startswith("text_")} | {"odd": torch.zeros(1)}, source / "a.pt")
    (source / "a.pt").rename(source / "model.safetensors")
    with pytest.raises(VarpiError, match=r"has no image tokenizer \(vqmodel"):
        varpi.load_tokenizer(source)
    with pytest.raises(VarpiError, match=r"missing: hf\.model\.vqmodel.*1 unexpected: odd"):
        varpi.load_generator(source)
    with pytest.raises(VarpiError, match="Emu3 has no compat setting 'shifted_logits'"):
        varpi.load_generator(folder, compat={"shifted_logits": True})
    with pytest.raises(VarpiError, match="'emu3-huge'; did you mean 'emu3-gen'"):
        varpi.load_generator(folder, architecture="emu3-huge")


def test_transformers_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(VarpiError, match=r"this generator needs transformers: pip install 'varpi\[text\]'"):
        varpi.load_generator(folder)


def test_shapes_that_are_refused(folder: Path, generator: Any) -> None:
    condition = generator.prepare_condition(CAPTIONS)
    with pytest.raises(VarpiError, match=r"tokens have shape \(3, 9\).*4x4 grid need \(3, 16\)"):
        generator.logits(codes()[:, :9], condition)
    with pytest.raises(VarpiError, match="3 prompts, but the cache is for 2"):
        generator.prefill(condition, generator.new_cache(2))
    with pytest.raises(VarpiError, match="its shapes are not static"):
        generator.new_cache(2, static=True)
    tokenizer = varpi.load_tokenizer(folder)
    with pytest.raises(VarpiError, match=r"shape \(1, 3, 16, 18\).*divisible by 4"):
        tokenizer.encode(torch.zeros(1, 3, 16, 18))
    with pytest.raises(VarpiError, match=r"shape \(1, 15\); they must be \(B, N\) with N a square"):
        tokenizer.decode(torch.zeros(1, 15, dtype=torch.int64))


def test_nothing_else_in_the_package_knows_of_it() -> None:
    """The point of families: one more is one more file."""
    package = Path(str(varpi.__file__)).parent
    texts = [path for path in package.rglob("*") if path.suffix in (".py", ".yaml", ".html")]
    assert [path.name for path in texts if re.search("emu3", path.read_text(), re.IGNORECASE)] == ["emu3.py"]


def test_the_check_of_captions_knows_the_context(generator: Any) -> None:
    check = pickle.loads(pickle.dumps(generator.caption_check))
    check("cat " * 16, "x:1")
    assert generator.prepare_condition(["cat " * 16]).ids.shape == (1, 22)
    with pytest.raises(Dropped, match=r"^x:1: the caption 'cat cat.*'… makes 23 tokens; 22 fit into the context$"):
        check("cat " * 17, "x:1")
