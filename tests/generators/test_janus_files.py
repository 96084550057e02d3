"""The released layouts of Janus-Pro: every name and shape, and a tiny checkpoint as deepseek writes it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import hf
import pytest
import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration

from varpi.errors import VarpiError
from varpi.generators import janus
from varpi.generators.janus_files import config_for, transformers_tensors, vq_tensors
from varpi.runtime.pretrained import Pretrained
from varpi.tokenizers import VQ, VQConfig

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, into: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def residual(name: str, into: int, out: int) -> Shapes:
    shapes = norm(f"{name}.norm1", into) | linear(f"{name}.conv1", out, into, 3, 3)
    shapes |= norm(f"{name}.norm2", out) | linear(f"{name}.conv2", out, out, 3, 3)
    return shapes | (linear(f"{name}.nin_shortcut", out, into, 1, 1) if into != out else {})


def attention(name: str, width: int) -> Shapes:
    shapes = norm(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= linear(f"{name}.{part}", width, width, 1, 1)
    return shapes


def vq16() -> Shapes:
    """LlamaGen's VQ-16, 71,883,403 weights and a statistic."""
    shapes = linear("encoder.conv_in", 128, 3, 3, 3)
    for side, widths, blocks in (("encoder", [128, 128, 256, 256, 512], 2), ("decoder", [512, 256, 256, 128, 128], 3)):
        lowest = 4 if side == "encoder" else 0
        into = 128 if side == "encoder" else 512
        for level, width in enumerate(widths):
            name = f"{side}.conv_blocks.{level}"
            for block in range(blocks):
                shapes |= residual(f"{name}.res.{block}", into, width)
                into = width
                if level == lowest:
                    shapes |= attention(f"{name}.attn.{block}", width)
            if level < 4:
                resample = "downsample" if side == "encoder" else "upsample"
                shapes |= linear(f"{name}.{resample}.conv", width, width, 3, 3)
        shapes |= residual(f"{side}.mid.0", 512, 512) | attention(f"{side}.mid.1", 512)
        shapes |= residual(f"{side}.mid.2", 512, 512) | norm(f"{side}.norm_out", widths[-1])
    shapes |= linear("encoder.conv_out", 256, 512, 3, 3)
    shapes |= linear("decoder.conv_in", 512, 256, 3, 3) | linear("decoder.conv_out", 3, 128, 3, 3)
    shapes |= linear("quant_conv", 8, 256, 1, 1) | linear("post_quant_conv", 256, 8, 1, 1)
    return shapes | {"quantize.embedding.weight": (16384, 8), "quantize.codebook_used": (65536,)}


def deepseek(width: int, hidden: int, layers: int) -> Shapes:
    """Every tensor of a released Janus-Pro, by deepseek's names."""
    shapes: Shapes = {
        "language_model.model.embed_tokens.weight": (102400, width),
        "language_model.model.norm.weight": (width,),
        "language_model.lm_head.weight": (102400, width),
        "gen_embed.weight": (16384, 8),
    }
    for i in range(layers):
        layer = f"language_model.model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
        shapes |= {f"{layer}.{part}_layernorm.weight": (width,) for part in ("input", "post_attention")}
    shapes |= linear("gen_aligner.layers.0", width, 8) | linear("gen_aligner.layers.2", width, width)
    shapes |= linear("gen_head.output_mlp_projector", width, width) | linear("gen_head.vision_head", 16384, width)
    shapes |= linear("aligner.layers.0", width, 1024) | linear("aligner.layers.2", width, width)
    tower = "vision_model.vision_tower"
    shapes |= {f"{tower}.pos_embed": (1, 576, 1024)} | linear(f"{tower}.patch_embed.proj", 1024, 3, 16, 16)
    shapes |= norm(f"{tower}.norm", 1024)
    for i in range(24):
        block = f"{tower}.blocks.{i}"
        shapes |= norm(f"{block}.norm1", 1024) | norm(f"{block}.norm2", 1024)
        shapes |= linear(f"{block}.attn.qkv", 3072, 1024) | linear(f"{block}.attn.proj", 1024, 1024)
        shapes |= linear(f"{block}.mlp.fc1", 4096, 1024) | linear(f"{block}.mlp.fc2", 1024, 4096)
    pool = f"{tower}.attn_pool"
    shapes |= {f"{pool}.latent": (1, 1, 1024)} | norm(f"{pool}.norm", 1024)
    shapes |= linear(f"{pool}.q", 1024, 1024) | linear(f"{pool}.kv", 2048, 1024) | linear(f"{pool}.proj", 1024, 1024)
    shapes |= linear(f"{pool}.mlp.fc1", 4096, 1024) | linear(f"{pool}.mlp.fc2", 1024, 4096)
    return shapes | {f"gen_vision_model.{name}": shape for name, shape in vq16().items()}


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def config_1b() -> dict[str, Any]:
    return {
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "language_config": {
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 16384,
            "vocab_size": 102400,
        },
    }


def config_7b() -> dict[str, Any]:
    language = {"model_type": "llama", "max_position_embeddings": 16384, "num_hidden_layers": 30, "vocab_size": 102400}
    return {"model_type": "multi_modality", "language_config": language}


@pytest.mark.parametrize(
    ("size", "config"), [((2048, 5632, 24), config_1b()), ((4096, 11008, 30), config_7b())], ids=["1b", "7b"]
)
def test_every_tensor_of_the_release_has_a_place(size: tuple[int, int, int], config: dict[str, Any]) -> None:
    tensors = on_meta(deepseek(*size))
    generator, weights = janus.assemble(Pretrained("release", tensors, config))[:2]
    expected = {name: tuple(tensor.shape) for name, tensor in generator.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected
    text: Any = generator.hf.config.text_config
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (size[0] // 128, size[0] // 128, 128)
    assert (text.max_position_embeddings, text.rms_norm_eps, text.rope_parameters["rope_theta"]) == (16384, 1e-6, 1e4)
    vision = generator.hf.config.vision_config
    assert (vision.num_attention_heads, vision.image_size, vision.mlp_ratio) == (16, 384, 4)
    assert (generator.num_tokens, generator.grid, generator.vocab_size, generator.tied) == (576, 24, 16384, False)


def test_the_named_sizes_are_those_of_the_releases() -> None:
    for architecture, size in (("janus-pro-1b", (2048, 5632, 24)), ("Janus-Pro-7B", (4096, 11008, 30))):
        with torch.device("meta"):
            model: Any = JanusForConditionalGeneration(config_for(architecture))
        renamed = transformers_tensors(on_meta(deepseek(*size)))
        assert {name: tuple(tensor.shape) for name, tensor in renamed.items()} == {
            name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
        }
    assert janus.FAMILY.architectures == ("janus-pro-1b", "janus-pro-7b")


def test_the_1b_model_has_the_known_number_of_weights() -> None:
    with torch.device("meta"):
        model: Any = JanusForConditionalGeneration(config_for("janus-pro-1b"))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert counts == {
        "language_model": 1_442_940_928,
        "vision_model": 303_688_704,
        "aligner": 6_295_552,
        "vqmodel": 71_883_403,
        "generation_embeddings": 131_072,
        "generation_aligner": 4_214_784,
        "generation_head": 37_767_168,
    }
    assert model.lm_head.weight.numel() == 209_715_200


def test_the_image_tokenizer_of_the_release_is_vq_16() -> None:
    source = Pretrained("release", on_meta(deepseek(2048, 5632, 24)), config_1b())
    tokenizer, weights = janus.assemble_tokenizer(source)[:2]
    assert tokenizer.config == VQConfig()
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in VQ(VQConfig()).state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == expected == vq16()


def test_unknown_architectures_are_refused() -> None:
    with pytest.raises(
        VarpiError, match="no Janus architecture is called 'janus-pro-3b'; known are janus-pro-1b, janus"
    ):
        config_for("janus-pro-3b")


# -- a tiny checkpoint in deepseek's layout


def to_deepseek(model: Any) -> dict[str, Tensor]:
    """The weights as deepseek's code would save them, with what transformers leaves out."""
    state = model.state_dict()
    tensors = {
        "vision_model.vision_tower.attn_pool.latent": torch.zeros(1, 1, 32),
        "gen_vision_model.quantize.codebook_used": torch.arange(65536.0),
        "language_model.lm_head.weight": state.pop("lm_head.weight"),
        "vision_model.vision_tower.pos_embed": state.pop("model.vision_model.embeddings.position_embedding.weight")[
            None
        ],
    }
    for kind in ("weight", "bias"):
        attention = "model.vision_model.encoder.layers.0.self_attn"
        qkv = [state.pop(f"{attention}.{letter}_proj.{kind}") for letter in "qkv"]
        tensors[f"vision_model.vision_tower.blocks.0.attn.qkv.{kind}"] = torch.cat(qkv)
    rules = [
        (r"model\.language_model\.(.*)", r"language_model.model.\1"),
        (r"model\.generation_embeddings\.(.*)", r"gen_embed.\1"),
        (r"model\.generation_aligner\.fc1\.(.*)", r"gen_aligner.layers.0.\1"),
        (r"model\.generation_aligner\.hidden_layers\.0\.(.*)", r"gen_aligner.layers.2.\1"),
        (r"model\.generation_head\.proj_out\.(.*)", r"gen_head.output_mlp_projector.\1"),
        (r"model\.generation_head\.vision_head\.(.*)", r"gen_head.vision_head.\1"),
        (r"model\.aligner\.fc1\.(.*)", r"aligner.layers.0.\1"),
        (r"model\.aligner\.hidden_layers\.0\.(.*)", r"aligner.layers.2.\1"),
        (r"model\.vision_model\.embeddings\.patch_embedding\.(.*)", r"vision_model.vision_tower.patch_embed.proj.\1"),
        (r"model\.vision_model\.post_layernorm\.(.*)", r"vision_model.vision_tower.norm.\1"),
        (r"model\.vision_model\.encoder\.layers\.0\.self_attn\.projection_layer\.(.*)",
         r"vision_model.vision_tower.blocks.0.attn.proj.\1"),
        (r"model\.vision_model\.encoder\.layers\.0\.layer_norm(.*)", r"vision_model.vision_tower.blocks.0.norm\1"),
        (r"model\.vision_model\.encoder\.layers\.0\.mlp\.(.*)", r"vision_model.vision_tower.blocks.0.mlp.\1"),
        (r"model\.vqmodel\.(en|de)coder\.(down|up)\.(\d)\.block\.(.*)",
         r"gen_vision_model.\1coder.conv_blocks.\3.res.\4"),
        (r"model\.vqmodel\.(en|de)coder\.(down|up)\.(\d)\.(.*)", r"gen_vision_model.\1coder.conv_blocks.\3.\4"),
        (r"model\.vqmodel\.(en|de)coder\.mid\.block_1\.(.*)", r"gen_vision_model.\1coder.mid.0.\2"),
        (r"model\.vqmodel\.(en|de)coder\.mid\.attn_1\.(.*)", r"gen_vision_model.\1coder.mid.1.\2"),
        (r"model\.vqmodel\.(en|de)coder\.mid\.block_2\.(.*)", r"gen_vision_model.\1coder.mid.2.\2"),
        (r"model\.vqmodel\.(.*)", r"gen_vision_model.\1"),
    ]  # fmt: skip
    for name, tensor in state.items():
        pattern, replacement = next(rule for rule in rules if re.fullmatch(rule[0], name))
        tensors[re.sub(pattern, replacement, name)] = tensor
    return tensors


@pytest.fixture(scope="module")
def model() -> Any:
    return hf.janus()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformers' layout. Read only."""
    return hf.save(model, tmp_path_factory.mktemp("janus"))


@pytest.fixture
def original(model: Any, folder: Path) -> Pretrained:
    """deepseek's layout."""
    language = {"model_type": "llama", "num_attention_heads": 4, "max_position_embeddings": 48, "rope_theta": 10000.0}
    config = {"model_type": "multi_modality", "language_config": {**language, "torch_dtype": "bfloat16"}}
    return Pretrained("original", to_deepseek(model), config, folder)


def test_both_layouts_give_the_same_model(model: Any, original: Pretrained, folder: Path) -> None:
    one, other = hf.load(janus, original), hf.load(janus, hf.source(folder))
    assert set(original.tensors) & set(hf.source(folder).tensors) == set()
    expected = other.state_dict()
    assert one.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in one.state_dict().items())
    tokens = torch.randint(64, (2, 16))
    condition = one.prepare_condition(["a cat", "the moon"])
    with torch.no_grad():
        assert torch.equal(one.logits(tokens, condition), other.logits(tokens, condition))
        images = torch.rand(2, 3, 16, 16)
        features = [m.model.vision_model(pixel_values=images).last_hidden_state for m in (one.hf, model)]
    torch.testing.assert_close(*features)
    assert "dtype" not in json.dumps(one.hf_config)


def test_both_layouts_give_the_same_image_tokenizer(original: Pretrained, folder: Path) -> None:
    sources = (original, hf.source(folder))
    (one, weights), (other, others) = (janus.assemble_tokenizer(source)[:2] for source in sources)
    assert one.config == other.config
    assert torch.equal(weights.pop("quantize.codebook_used"), torch.arange(65536.0))
    assert torch.equal(others.pop("quantize.codebook_used"), torch.zeros(65536))
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def test_the_configuration_is_what_the_tensors_say(original: Pretrained, folder: Path) -> None:
    """Only the number of attention heads leaves no trace in them."""
    generator = janus.assemble(original).model
    made, expected = generator.hf_config, json.loads((folder / "config.json").read_text())
    for section in ("text_config", "vision_config", "vq_config"):
        changed = {key for key, value in expected[section].items() if made[section].get(key) != value}
        assert changed <= {"dtype", "bos_token_id", "eos_token_id"}, section
    assert made["image_token_id"] == hf.IDS[hf.IMAGE]
    assert made["model_type"] == "janus"


def test_the_language_config_is_kept_where_tensors_say_nothing(original: Pretrained) -> None:
    original.config["language_config"] |= {"rope_theta": 5e5, "rms_norm_eps": 1e-5, "hidden_size": 9999}
    text: Any = janus.assemble(original).model.hf.config.text_config
    assert (text.rope_parameters["rope_theta"], text.rms_norm_eps, text.hidden_size) == (5e5, 1e-5, 32)


def test_unknown_and_broken_names_are_left_as_they_are(original: Pretrained) -> None:
    extra = {
        "vision_model.vision_tower.head.weight": torch.zeros(2),
        "vision_model.vision_tower.blocks.0.attn.qkv.scale": torch.zeros(4),
        "vision_gen_enc_model.conv.weight": torch.zeros(2),
        "gen_vision_model.encoder.mid.0.conv3.weight": torch.zeros(2),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    original.tensors.update(extra)
    generator, weights = janus.assemble(original)[:2]
    left = set(weights) - set(generator.state_dict())
    assert left == {
        "vision_model.vision_tower.head.weight",
        "vision_model.vision_tower.blocks.0.attn.qkv.scale",
        "vision_gen_enc_model.conv.weight",
        "gen_vision_model.encoder.mid.0.conv3.weight",
    }


def test_names_of_transformers_stay_as_they_are(folder: Path) -> None:
    tensors = hf.source(folder).tensors
    assert transformers_tensors(tensors).keys() == tensors.keys()
    assert len(vq_tensors(tensors)) == len([name for name in tensors if ".vqmodel." in name])


def test_incomplete_checkpoints_are_refused(original: Pretrained) -> None:
    del original.tensors["language_model.model.embed_tokens.weight"]
    message = r"original: is not a whole Janus checkpoint: model\.language_model\.embed_tokens\.weight is missing"
    with pytest.raises(VarpiError, match=message):
        janus.assemble(original)
    original.tensors["language_model.model.embed_tokens.weight"] = torch.zeros(3)
    with pytest.raises(VarpiError, match=r"embed_tokens\.weight has shape \(3,\); it must have 2 dimensions"):
        janus.assemble(original)


def test_a_model_that_only_understands_images_is_refused(original: Pretrained) -> None:
    tensors = {name: tensor for name, tensor in original.tensors.items() if not name.startswith("gen_")}
    with pytest.raises(VarpiError, match=r"original: has no image head .*: give a Janus-Pro checkpoint"):
        janus.assemble(Pretrained("original", tensors, original.config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_config": {"model_type": "llama", "hidden_size": "wide"}},
            "config.json does not describe a Janus model",
        ),
        ({"text_config": {"model_type": "nothing"}}, "config.json does not describe a Janus model"),
        ({"vision_config": {"patch_size": 0}}, "config.json does not describe a Janus model: .*zero"),
        (
            {"text_config": {"model_type": "llama", "num_hidden_layers": 10**9}},
            "num_hidden_layers 1000000000, its tensors",
        ),
        ({"vq_config": {"num_res_blocks": 10**9}}, "says num_res_blocks 1000000000, its tensors are"),
        (
            {"text_config": {"model_type": "llama", "hidden_size": 2**62, "num_hidden_layers": 1}},
            "config.json describe",
        ),
        ({"vision_config": {"hidden_act": "geeelu"}}, "no model is as config.json describes it: 'geeelu'"),
        ({"vision_config": {"num_image_tokens": 100}}, r"config.json says 100 image tokens, but a grid of 24x24"),
    ],
)
def test_broken_configurations_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    source = hf.source(folder)
    source.config.update(changes)
    with pytest.raises(VarpiError, match=message) as caught:
        janus.assemble(source)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


# -- the text tokenizer's files


def test_special_tokens_are_looked_up_by_their_strings(folder: Path, tmp_path: Path) -> None:
    """The ids in the JSON files count only where the tokenizer does not know the string."""
    for file in ("tokenizer.json", "generation_config.json"):
        shutil.copy(folder / file, tmp_path)
    stored = {"bos_token_id": 1, "pad_token_id": 2, "generation_kwargs": {"boi_token_id": 3}}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    source = hf.source(folder)
    source = Pretrained(source.where, source.tensors, source.config, tmp_path)
    expected = {"bos_token_id": hf.BOS, "pad_token_id": hf.PAD, "boi_token_id": hf.BOI, "image_token_id": hf.IMAGE}
    assert janus.assemble(source).model.special_ids == {name: hf.IDS[text] for name, text in expected.items()}
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace(hf.PAD, "<nothing>").replace(hf.BOI, "<else>"))
    ids = janus.assemble(source).model.special_ids
    assert (ids["bos_token_id"], ids["pad_token_id"], ids["boi_token_id"]) == (hf.IDS[hf.BOS], 2, 3)
    (tmp_path / "tokenizer.json").unlink()
    ids = janus.assemble(source).model.special_ids
    assert (ids["bos_token_id"], ids["pad_token_id"], ids["boi_token_id"]) == (1, 2, 3)


@pytest.mark.parametrize(
    ("file", "message"),
    [("tokenizer.json", "is not a text tokenizer"), ("generation_config.json", "cannot be read as JSON")],
)
def test_broken_text_files_are_refused(folder: Path, tmp_path: Path, file: str, message: str) -> None:
    source = hf.source(folder)
    (tmp_path / file).write_text("{broken")
    with pytest.raises(VarpiError, match=rf"{file}: {message}"):
        janus.assemble(Pretrained(source.where, source.tensors, source.config, tmp_path))


def test_padding_stored_with_the_tokenizer_is_not_applied(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    source = hf.source(folder)
    cut = hf.load(janus, Pretrained(source.where, source.tensors, source.config, tmp_path))
    whole = hf.load(janus, source)
    assert cut.prepare_condition(["a red cat"]).ids.tolist() == whole.prepare_condition(["a red cat"]).ids.tolist()


def test_what_depends_on_the_size() -> None:
    config: Any = config_for("janus-pro-7b")
    assert config.model_type == "janus"
    assert (config.text_config.num_attention_heads, config.text_config.max_position_embeddings) == (32, 16384)
    assert (config.vision_config.projection_dim, config.vq_config.num_patches) == (4096, 24)
