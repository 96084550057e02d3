"""Checkpoints: every form that comes in, both that go out, and everything that is refused."""

import argparse
import hashlib
import json
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from varpi.errors import VarpiError
from varpi.generators import LlamaGen, LlamaGenConfig
from varpi.generators.llamagen_files import original_name
from varpi.tokenizers import VQ, VQConfig
from varpi.weights import (
    export_original,
    load_generator,
    load_tokenizer,
    read_checkpoint,
    save_generator,
    save_tokenizer,
    sha256_of,
    to_original,
)
from varpi.weights.pair import check_pair

CONFIG = LlamaGenConfig(dim=32, n_layer=2, n_head=2, vocab_size=24, grid=4, num_classes=5)
VQ_CONFIG = VQConfig(
    downsample=4, channels=8, codebook_size=24, codebook_dim=4, latent_channels=8, norm_groups=4, decoder_blocks=2
)


@pytest.fixture(scope="module")
def generator() -> LlamaGen:
    torch.manual_seed(5)
    generator = LlamaGen(CONFIG)
    with torch.no_grad():
        generator.output.weight.normal_()
    return generator


@pytest.fixture(scope="module")
def tokenizer() -> VQ:
    torch.manual_seed(6)
    return VQ(VQ_CONFIG)


def assert_same(model: Any, other: Any) -> None:
    """Both hold the same bytes under the same names."""
    state, expected = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes(), name


# -- in


def test_the_original_keys(generator: LlamaGen) -> None:
    state = to_original(generator)
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if "layers.1" not in name} == {
        "cls_embedding.embedding_table.weight": (6, 32),
        "tok_embeddings.weight": (24, 32),
        "layers.0.attention_norm.weight": (32,),
        "layers.0.attention.wqkv.weight": (96, 32),
        "layers.0.attention.wo.weight": (32, 32),
        "layers.0.ffn_norm.weight": (32,),
        "layers.0.feed_forward.w1.weight": (256, 32),
        "layers.0.feed_forward.w3.weight": (256, 32),
        "layers.0.feed_forward.w2.weight": (32, 256),
        "norm.weight": (32,),
        "output.weight": (24, 32),
    }
    assert torch.equal(
        state["layers.1.feed_forward.w3.weight"], generator.get_parameter("blocks.1.feed_forward.up.weight")
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"state": {}}, "steps": 3, "args": argparse.Namespace(lr=1e-4)},
        lambda state: {"module": state},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {"module": {"model": {f"_orig_mod.module.{name}": value for name, value in state.items()}}},
        lambda state: {f"gpt_model.{name}": tensor for name, tensor in state.items()},
        lambda state: {name.replace("layers.1.", "layers.1._orig_mod."): value for name, value in state.items()},
        lambda state: {
            **state,
            "freqs_cis": torch.zeros(17, 8, 2),
            "layers.0.attention.kv_cache.k_cache": torch.zeros(1, 2, 24, 16),
        },
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_and_prefixes(generator: LlamaGen, tmp_path: Path, wrap: Callable[[dict], dict], legacy: bool) -> None:
    content = wrap(to_original(generator))
    assert_same(load_generator(content, architecture=CONFIG), generator)
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert_same(load_generator(path, architecture=CONFIG), generator)


def test_the_model_is_its_own(generator: LlamaGen) -> None:
    state = {name: tensor.clone() for name, tensor in to_original(generator).items()}
    loaded = load_generator(state, architecture=CONFIG)
    assert isinstance(loaded, LlamaGen)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.rotary, generator.rotary)
    with torch.no_grad():
        loaded.output.weight.zero_()
    assert state["output.weight"].abs().sum() > 0
    assert len(state) == 4 + 2 * 7


def test_dtype(generator: LlamaGen) -> None:
    loaded = load_generator(to_original(generator), architecture=CONFIG, dtype=torch.bfloat16)
    assert isinstance(loaded, LlamaGen)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.rotary.dtype == torch.float32
    assert torch.equal(loaded.norm.weight, generator.norm.weight.bfloat16())
    with pytest.raises(VarpiError, match=r"dtype is torch.int8; weights need a floating-point one"):
        load_generator(to_original(generator), architecture=CONFIG, dtype=torch.int8)


def meta_state(config: LlamaGenConfig) -> dict[str, Tensor]:
    """A checkpoint of that size which takes no memory: every tensor is one zero, expanded."""
    with torch.device("meta"):
        model = LlamaGen(config)
    return {original_name(name): torch.zeros(()).expand(value.shape) for name, value in model.state_dict().items()}


def test_size_is_inferred_from_tensors() -> None:
    config = LlamaGenConfig.named("b", grid=24, num_classes=10, vocab_size=64)
    loaded = load_generator(meta_state(config), image_size=384)
    assert isinstance(loaded, LlamaGen)
    assert loaded.config == config
    text = LlamaGenConfig.named("b", grid=16, conditioning="text", vocab_size=64, condition_tokens=7, caption_dim=48)
    loaded = load_generator(meta_state(text), image_size=256)
    assert isinstance(loaded, LlamaGen)
    assert loaded.config == text


def test_tokenizer_is_inferred_from_tensors(tokenizer: VQ, tmp_path: Path) -> None:
    config = VQConfig(downsample=4, channels=32, codebook_size=24, codebook_dim=4, latent_channels=8, encoder_blocks=1)
    original = VQ(config)
    torch.save({"model": original.state_dict()}, tmp_path / "vq.pt")
    loaded = load_tokenizer(tmp_path / "vq.pt")
    assert isinstance(loaded, VQ)
    assert loaded.config == config
    assert_same(loaded, original)
    assert_same(load_tokenizer(tokenizer.state_dict(), architecture=VQ_CONFIG), tokenizer)


def sharded(directory: Path, state: dict[str, Tensor]) -> Path:
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(state)}
    for shard in set(weight_map.values()):
        save_file({name: value for name, value in state.items() if weight_map[name] == shard}, directory / shard)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_sharded_safetensors(generator: LlamaGen, tmp_path: Path) -> None:
    index = sharded(tmp_path, to_original(generator))
    assert_same(load_generator(tmp_path, architecture=CONFIG), generator)
    assert_same(load_generator(index, architecture=CONFIG), generator)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(VarpiError, match=r"its shard part-1.safetensors is missing"):
        load_generator(tmp_path, architecture=CONFIG)
    index.write_text(json.dumps({"weight_map": {"tok_embeddings.weight": f"part-{'9' * 5000}.safetensors"}}))
    with pytest.raises(VarpiError, match=r"its shard part-9{195}… is missing$"):
        load_generator(tmp_path, architecture=CONFIG)
    index = sharded(tmp_path, to_original(generator))
    save_file({"other": torch.zeros(1)}, tmp_path / "part-1.safetensors")
    with pytest.raises(VarpiError, match=r"9 listed tensors are in no shard: tok_embeddings.weight"):
        load_generator(tmp_path, architecture=CONFIG)
    index.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(VarpiError, match=r"lists '../elsewhere.safetensors', which is not the name of a file beside"):
        load_generator(tmp_path, architecture=CONFIG)
    index.write_text("{")
    with pytest.raises(VarpiError, match=r"index.json: cannot be read as JSON"):
        load_generator(tmp_path, architecture=CONFIG)


def test_directories(generator: LlamaGen, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match="holds no checkpoint"):
        load_generator(tmp_path, architecture=CONFIG)
    torch.save(to_original(generator), tmp_path / "any.pth")
    assert_same(load_generator(tmp_path, architecture=CONFIG), generator)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(VarpiError, match=r"holds 2 checkpoints \(any.pth, other.safetensors\); name one"):
        load_generator(tmp_path, architecture=CONFIG)
    torch.save(to_original(generator), tmp_path / "consolidated.pth")
    assert_same(load_generator(str(tmp_path), architecture=CONFIG), generator)


# -- out


def test_own_format_round_trip(generator: LlamaGen, tokenizer: VQ, tmp_path: Path) -> None:
    path = tmp_path / "run" / "model.safetensors"
    save_generator(generator, path, extra={"step": "7"})
    for source in (path, path.parent):
        loaded = load_generator(source)
        assert isinstance(loaded, LlamaGen)
        assert loaded.config == CONFIG
        assert_same(loaded, generator)
    metadata = read_checkpoint(path).metadata
    assert metadata is not None
    assert metadata["step"] == "7"
    description = json.loads(metadata["varpi"])
    assert (description["format"], description["kind"], description["architecture"]) == (1, "generator", "llamagen")
    assert description["config"]["dim"] == 32
    save_tokenizer(tokenizer, tmp_path / "vq.safetensors")
    loaded = load_tokenizer(tmp_path / "vq.safetensors")
    assert isinstance(loaded, VQ)
    assert loaded.config == VQ_CONFIG
    assert_same(loaded, tokenizer)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]  # nothing is left beside it


def test_saving_given_weights(generator: LlamaGen, tmp_path: Path) -> None:
    state = {name: torch.full_like(tensor, 2) for name, tensor in generator.state_dict().items()}
    save_generator(generator, tmp_path / "a.safetensors", state_dict=state)
    assert {float(tensor.sum() / tensor.numel()) for tensor in load_file(tmp_path / "a.safetensors").values()} == {2}
    del state["norm.weight"]
    with pytest.raises(VarpiError, match=r"not the tensors of this generator: norm.weight"):
        save_generator(generator, tmp_path / "a.safetensors", state_dict=state)


@pytest.mark.parametrize("name", ["back.pt", "back.safetensors"])
def test_original_to_ours_to_original_is_byte_equal(generator: LlamaGen, tmp_path: Path, name: str) -> None:
    original = {key: tensor.clone() for key, tensor in to_original(generator).items()}
    torch.save({"model": original}, tmp_path / "c2i.pt")
    save_generator(load_generator(tmp_path / "c2i.pt", architecture=CONFIG), tmp_path / "ours.safetensors")
    export_original(load_generator(tmp_path / "ours.safetensors"), tmp_path / name)
    load = load_file if name.endswith("safetensors") else torch.load
    back = load(tmp_path / name)  # a flat dictionary
    assert set(back) == set(original)
    for key, tensor in original.items():
        assert back[key].dtype == tensor.dtype
        assert back[key].numpy().tobytes() == tensor.numpy().tobytes(), key


def test_exported_tokenizer_is_wrapped_like_the_released_ones(tokenizer: VQ, tmp_path: Path) -> None:
    export_original(tokenizer, tmp_path / "vq.pt")
    content = torch.load(tmp_path / "vq.pt", weights_only=True)
    assert list(content) == ["model"]
    assert content["model"]["quantize.codebook_used"].shape == (65536,)
    assert_same(load_tokenizer(tmp_path / "vq.pt", architecture=VQ_CONFIG), tokenizer)


def test_export_writes_no_more_than_the_weights(generator: LlamaGen, tmp_path: Path) -> None:
    merged = torch.randn(2, 24, 32)
    state = {**generator.state_dict(), "output.weight": merged[1]}  # a view of something larger
    other = LlamaGen(CONFIG)
    other.load_state_dict(state, assign=True)
    export_original(other, tmp_path / "view.pt")
    written = torch.load(tmp_path / "view.pt", weights_only=True)["output.weight"]
    assert torch.equal(written, merged[1])
    assert written.untyped_storage().nbytes() == written.nbytes


@contextmanager
def full_disk() -> Iterator[None]:
    """Writing more than 64 KiB to a file fails, as on a disk without space; to pytest's own output too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("write", [save_generator, export_original])
def test_a_write_that_fails_leaves_the_old_file(
    generator: LlamaGen, tmp_path: Path, write: Callable[..., None]
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    refused = pytest.raises(VarpiError, match=r"model.pt: could not be written \(.*\); nothing was overwritten")
    with full_disk(), refused:
        write(generator, path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


def test_no_space_left(generator: LlamaGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(VarpiError, match=r"no space left on the disk \([\d,]+ bytes needed, 1,000 free\)"):
        save_generator(generator, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places(generator: LlamaGen, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match="is a directory; give the name of a file"):
        save_generator(generator, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(VarpiError, match="could not be written"):
        save_generator(generator, tmp_path / "file" / "model.safetensors")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


# -- refused


def refused(source: Any, message: str, **settings: Any) -> None:
    with pytest.raises(VarpiError, match=message) as caught:
        load_generator(source, **{"architecture": CONFIG, **settings})
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "c2i_XXL_384.pt", r"c2i_XXL_384.pt: no such file or directory, and neither a Hub id")
    refused("digit", r"digit: no such file or directory.*nor embedded \(digits, cifar10, shapes\)")
    (tmp_path / "weights.npz").touch()
    refused(tmp_path / "weights.npz", "weights.npz: not a checkpoint file; the name must end in one of .safetensors")
    refused({}, "state dict: holds no tensors")
    refused({"model": {}}, "state dict: holds no tensors")


def test_missing_unexpected_and_misshapen_tensors_are_listed(generator: LlamaGen) -> None:
    state = to_original(generator)
    for name in [name for name in state if "layers.1" in name and "attention.w" not in name] + ["norm.weight"]:
        del state[name]
    refused(
        {**state, "extra.bias": torch.zeros(1), "output.weight": torch.zeros(25, 32)},
        r"does not fit the given LlamaGenConfig: 6 missing: (layers\S+, ){5}…; 1 unexpected: extra.bias; "
        r"1 of the wrong shape: output.weight \(25, 32\) instead of \(24, 32\)",
    )


def test_none_of_the_tensors(tokenizer: VQ) -> None:
    refused(
        {"a.weight": torch.zeros(2), "b": torch.zeros(2)}, r"no generator that varpi knows; its tensors are a.weight, b"
    )
    refused(tokenizer.state_dict(), "no generator that varpi knows; .*this is a tokenizer")


def test_a_generator_is_no_tokenizer(generator: LlamaGen, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=r"no tokenizer that varpi knows; .*this is a generator"):
        load_tokenizer(to_original(generator))
    save_generator(generator, tmp_path / "model.safetensors")
    with pytest.raises(VarpiError, match="holds a generator, not a tokenizer"):
        load_tokenizer(tmp_path)


def test_contradictions_name_both_sides(generator: LlamaGen, tokenizer: VQ, tmp_path: Path) -> None:
    state = to_original(generator)
    refused(
        state,
        r"the tensors say vocab_size 24, dim 32, n_layer 2, ffn_dim 256, num_classes 5, but architecture "
        r"'llamagen-c2i-xxl' says vocab_size 16384, dim 1536, n_layer 48, ffn_dim 4096, num_classes 1000",
        architecture="llamagen-c2i-xxl",
        image_size=384,
    )
    text = LlamaGenConfig(32, 2, 2, vocab_size=24, grid=4, num_classes=5, conditioning="text")
    refused(
        state, "tensors say conditioning class, but the given LlamaGenConfig says conditioning text", architecture=text
    )
    save_generator(generator, tmp_path / "model.safetensors")
    heads = LlamaGenConfig(32, 2, 4, vocab_size=24, grid=4, num_classes=5)
    refused(tmp_path, "inside the file says n_head 2, but the given LlamaGenConfig says n_head 4", architecture=heads)
    with pytest.raises(
        VarpiError, match=r"the tensors say .*downsample 4.*but architecture 'vq-16' says .*downsample 16"
    ):
        load_tokenizer(tokenizer.state_dict(), architecture="vq-16")


def test_what_tensors_do_not_tell(generator: LlamaGen) -> None:
    state = to_original(generator)
    refused(state, "does not tell for which image size it is; pass image_size", architecture=None)
    refused(state, "no named LlamaGen has 2 layers of width 32.*pass architecture", architecture=None, image_size=256)
    with pytest.raises(VarpiError, match=r"do not tell latent_channels, channels, .*name the architecture"):
        load_tokenizer({"quantize.embedding.weight": torch.zeros(24, 4)})


def test_unknown_architectures(generator: LlamaGen) -> None:
    state = to_original(generator)
    refused(state, "did you mean 'llamagen-c2i-xxl'", architecture="llamagen-c2i-xx", image_size=256)
    refused(state, "no generator architecture is called 'resnet'; known are", architecture="resnet", image_size=256)
    with pytest.raises(VarpiError, match="no tokenizer architecture is called 'vq-32'"):
        load_tokenizer(VQ(VQ_CONFIG).state_dict(), architecture="vq-32")


def test_image_sizes_that_do_not_fit(generator: LlamaGen, tmp_path: Path) -> None:
    refused(to_original(generator), "image_size is 250; it must be a multiple of 16", architecture=None, image_size=250)
    save_generator(generator, tmp_path / "model.safetensors")
    refused(tmp_path, "image_size is 20, but the generator's grid is 4x4", architecture=None, image_size=20)
    assert load_generator(tmp_path, image_size=16).num_tokens == 16


def test_damaged_files(generator: LlamaGen, tmp_path: Path) -> None:
    save_generator(generator, tmp_path / "whole.safetensors")
    export_original(generator, tmp_path / "whole.pt")
    torch.save(to_original(generator), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name, share in (("whole.safetensors", 0.5), ("whole.pt", 0.5), ("old.pt", 0.5), ("old.pt", 0.01)):
        content = (tmp_path / name).read_bytes()
        path = tmp_path / f"cut-{name}"
        path.write_bytes(content[: int(len(content) * share)])
        refused(path, r"cut-\S+: not a readable (safetensors file|PyTorch checkpoint).* truncated")
    for content in (b"", b"this is a text file\n" * 20):
        for suffix in ("pt", "safetensors"):
            (tmp_path / f"x.{suffix}").write_bytes(content)
            refused(tmp_path / f"x.{suffix}", rf"x.{suffix}: not a readable")


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.system, ("exit 1",))


def test_pickles_that_are_not_plain_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": Harmful()}, path)
    refused(path, r"model.pt: holds posix.system, not only plain tensors, and is refused")
    path.write_bytes(pickle.dumps({"model": Harmful()}, protocol=2))
    refused(path, r"holds posix.system, not only plain tensors")
    torch.save([torch.zeros(1)], path)
    refused(path, "holds a list, not a dictionary of tensors")
    torch.save({"weights": torch.zeros(1), "epoch": 3}, path)
    refused(path, "entry 'epoch' is a int, not a tensor")


def test_tensors_that_are_not_weights(generator: LlamaGen) -> None:
    state = to_original(generator)
    refused({**state, "norm.weight": torch.ones(32, dtype=torch.int64)}, "norm.weight is torch.int64; weights must be")
    for bad in (float("nan"), float("inf")):
        damaged = state["layers.0.attention.wo.weight"].clone()
        damaged[3, 4] = bad
        refused({**state, "layers.0.attention.wo.weight": damaged}, r"attention.wo.weight holds NaN or infinite values")
    large = {**state, "norm.weight": torch.full((32,), 1e6)}
    refused(large, r"norm.weight holds NaN or infinite values \(as torch.float16\)", dtype=torch.float16)
    refused({**state, "module.norm.weight": torch.ones(32)}, "two entries are called 'norm.weight'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this varpi reads format 1"),
        ({"architecture": "diffusion"}, "holds a 'diffusion' generator, which this varpi does not know"),
        ({"config": {"dim": 32, "depth": 3}}, "fields that this varpi does not know: depth"),
        ({"config": {"dim": 32}}, "its configuration is not valid"),
        ({"config": 3}, "not a description that varpi wrote"),
    ],
)
def test_foreign_descriptions(generator: LlamaGen, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_generator(generator, path)
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["varpi"])
    save_file(load_file(path), path, metadata={"varpi": json.dumps(description | change)})
    refused(path, message, architecture=None)


def test_pairs(generator: LlamaGen, tokenizer: VQ) -> None:
    check_pair(generator, tokenizer)
    other = VQ(VQConfig(downsample=4, channels=32, codebook_size=32))
    with pytest.raises(VarpiError, match="vocabulary has 24 tokens, the tokenizer's codebook 32"):
        check_pair(generator, other)


# -- the Hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network."""

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    return tmp_path / "hub"


def put_in_cache(cache: Path, revision: str) -> Path:
    """The directory of a cached snapshot of org/name."""
    snapshot = cache / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    reference = cache / "models--org--name" / "refs" / revision
    reference.parent.mkdir(parents=True)
    reference.write_text("a" * 40)
    return snapshot


@pytest.mark.usefixtures("hub_cache")
def test_hub_offline() -> None:
    refused(
        "org/name", r"org/name: .* the Hub cannot be reached \(ConnectionError\).*cache does not hold it; download it"
    )
    refused("org/name@v2:c2i.pt", r"org/name@v2: .*the Hub cannot be reached")


def test_hub_offline_but_cached(generator: LlamaGen, hub_cache: Path) -> None:
    snapshot = put_in_cache(hub_cache, "v2")
    export_original(generator, snapshot / "c2i_B_256.pt")
    assert_same(load_generator("org/name@v2", architecture=CONFIG), generator)
    assert_same(load_generator("org/name@v2:c2i_B_256.pt", architecture=CONFIG), generator)
    refused("org/name@v2:other.pt", r"org/name@v2: the Hub cannot be reached, and its cache does not hold 'other.pt'")
    export_original(generator, snapshot / "c2i_L_256.pt")
    refused("org/name@v2", r"holds 2 checkpoints \(c2i_B_256.pt, c2i_L_256.pt\); name one: org/name@v2:<file>")


def test_hub_online_fetches_only_what_is_needed(
    generator: LlamaGen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tmp_path, to_original(generator))
    fetched: list[tuple[str, list[str], str | None]] = []

    def model_info(self: Any, repo: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        names = ["model.safetensors.index.json", "part-0.safetensors", "part-1.safetensors", "README.md", "old/x.pt"]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.append((repo, allow_patterns, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(load_generator("org/name@main", architecture=CONFIG), generator)
    wanted = [["model.safetensors.index.json"], ["part-0.safetensors", "part-1.safetensors"]]
    assert fetched == [("org/name", names, "main") for names in wanted]
