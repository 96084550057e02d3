import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny_t5
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from varpi.data.captions import clean_caption
from varpi.data.text_encoder import TextEncoder
from varpi.errors import VarpiError

WORDS = ("a", "photo", "of", "cat", "dog", "red")
CAPTIONS = ["A photo of a cat!", "dog", "", "<b>a red DOG</b> of a cat, of a dog, of a zebra", "日本"]


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_t5.make(tmp_path_factory.mktemp("t5"), WORDS)


@pytest.fixture(scope="session")
def encoder(t5: Path) -> TextEncoder:
    return TextEncoder(t5, dtype=torch.float32)


@pytest.fixture
def broken(t5: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(t5, tmp_path / "broken"))


def refused(source: object, match: str, **options: Any) -> None:
    with pytest.raises(VarpiError, match=match) as caught:
        TextEncoder(source, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


def test_llamagens_recipe(t5: Path, encoder: TextEncoder) -> None:
    """Padded on the right to max_length, masked; then the valid tokens alone."""
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(t5)
    model = T5EncoderModel.from_pretrained(t5, dtype=torch.float32)
    cleaned = [clean_caption(clean_caption(caption)) for caption in CAPTIONS]
    tokens = tokenizer(
        cleaned, max_length=120, padding="max_length", truncation=True, add_special_tokens=True, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    assert hidden.shape == (5, 120, 16)
    lengths = tokens["attention_mask"].sum(1).tolist()
    assert lengths[1:3] == [2, 1]  # dog </s>, and </s>
    features = encoder(CAPTIONS)
    assert [part.shape for part in features] == [(length, 16) for length in lengths]
    for ours, theirs, length in zip(features, hidden, lengths, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs[:length], atol=1e-5, rtol=0)


def test_company_does_not_matter(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    together = encoder(CAPTIONS)
    alone = [encoder([caption])[0] for caption in CAPTIONS]
    monkeypatch.setattr(encoder, "batch_size", 2)
    for parts in (alone, encoder(CAPTIONS)):
        for one, other in zip(together, parts, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert (together[0][:1] - together[3][:1]).abs().max() > 1e-2  # while captions do differ
    assert encoder([]) == []


def test_batch_size_bounds_a_pass(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def forward(input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        passes.append(len(input_ids))
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, 16))

    monkeypatch.setattr(encoder, "_model", forward)
    assert len(encoder(["a cat"] * 70)) == 70
    assert passes == [32, 32, 6]


def test_a_long_caption_is_cut_before_its_end_token(t5: Path, encoder: TextEncoder) -> None:
    long = "a cat, " * 1430
    assert len(long) > 10_000
    (features,) = encoder([long])
    assert features.shape == (120, 16)
    short = TextEncoder(t5, max_tokens=5, dtype=torch.float32)
    torch.testing.assert_close(short(["a cat a dog red red red"])[0], encoder(["a cat a dog"])[0])


def test_captions_are_cleaned_twice(encoder: TextEncoder) -> None:
    plain, quoted_twice, tagged_twice = encoder(["a cat", "A%2520cat", "&lt;b&gt;a cat"])
    torch.testing.assert_close(plain, quoted_twice)
    torch.testing.assert_close(plain, tagged_twice)


def test_frozen_yet_fit_for_training(encoder: TextEncoder) -> None:
    assert not encoder._model.training
    assert not any(parameter.requires_grad for parameter in encoder._model.parameters())
    (features,) = encoder(["a cat"])
    projection = torch.ones(16, requires_grad=True)
    (features * projection).sum().backward()  # what torch.inference_mode gives would raise
    torch.testing.assert_close(projection.grad, features.sum(0))


def test_autocast_around_it_changes_nothing(encoder: TextEncoder) -> None:
    expected = encoder(["a red dog"])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(["a red dog"])[0], expected)


def test_bfloat16_by_default(t5: Path, encoder: TextEncoder) -> None:
    half = TextEncoder(str(t5))
    assert (half.source, half.width, half.max_tokens) == (str(t5), 16, 120)
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.bfloat16}
    ours, exact = half(["a photo of a cat"])[0], encoder(["a photo of a cat"])[0]
    assert ours.dtype == torch.float32
    error = (ours - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.03


def test_the_same_t5_every_time(t5: Path, tmp_path: Path) -> None:
    ours, theirs = (load_file(tiny_t5.make(tmp_path / f"{i}", WORDS) / "model.safetensors") for i in range(2))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (t5 / "tokenizer.json").read_bytes() == (tmp_path / "0" / "tokenizer.json").read_bytes()


def test_not_a_list_of_strings(encoder: TextEncoder) -> None:
    with pytest.raises(VarpiError, match="takes a list of captions, not a single string"):
        encoder("a cat")
    with pytest.raises(VarpiError, match="a caption is of type NoneType"):
        encoder(["a cat", None])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("config.json", r"broken: holds no config.json; expected a T5"),
        ("tokenizer.json", r"broken: holds no tokenizer \(tokenizer.json or spiece.model\)"),
        ("model.safetensors", r"broken: its weights cannot be loaded \(OSError: .*no file named model.safetensors"),
    ],
)
def test_a_file_is_missing(broken: Path, file: str, match: str) -> None:
    (broken / file).unlink()
    refused(broken, match)


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("config.json", r"broken: its config.json cannot be read \(JSONDecodeError"),
        ("tokenizer.json", r"broken: its tokenizer cannot be loaded"),
        ("model.safetensors", r"broken: its weights cannot be loaded"),
    ],
)
def test_a_file_is_truncated(broken: Path, file: str, match: str) -> None:
    (broken / file).write_bytes((broken / file).read_bytes()[:40])
    refused(broken, match)


@pytest.mark.parametrize("config", [{"model_type": "bert"}, {}, ["t5"]])
def test_not_a_t5(broken: Path, config: Any) -> None:
    (broken / "config.json").write_text(json.dumps(config))
    refused(broken, rf"broken: is a model of type {'.bert.' if 'model_type' in config else None}; .* must be a T5")


@pytest.mark.parametrize("extra", [999999999, -1, "100"])
def test_a_tokenizer_that_makes_too_many_tokens_up(broken: Path, extra: Any) -> None:
    path = broken / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_ids": extra}))
    refused(broken, rf"broken: its tokenizer_config.json asks for {extra!r} extra_ids; a T5 has 100")


def test_a_weight_is_missing(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    refused(broken, r"broken: 1 weights of the encoder are missing, encoder.block.1.layer.0.SelfAttention.q.weight")


def test_a_weight_of_another_shape(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    weights["encoder.final_layer_norm.weight"] = torch.ones(17)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    refused(broken, r"broken: its weights cannot be loaded \(RuntimeError")


def test_the_tokenizer_of_another_model(broken: Path, tmp_path: Path) -> None:
    tiny_t5.make(tmp_path / "other", [*WORDS, "more", "words"])
    shutil.copy(tmp_path / "other" / "tokenizer.json", broken)
    refused(broken, r"broken: its tokenizer has 38 tokens, the model 36; they do not belong together")


def test_bad_arguments(t5: Path) -> None:
    refused(t5, "max_tokens is 0; it must be at least 1", max_tokens=0)
    refused(t5 / "config.json", "no such directory, nor a Hub id")
    refused("flan-t5-xl", "flan-t5-xl: no such directory, nor a Hub id")


@pytest.mark.parametrize("package", ["transformers", "ftfy"])
def test_missing_packages(t5: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(t5, rf"needs {package}: pip install 'varpi\[text\]'")


# -- the Hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network."""

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    return tmp_path / "hub"


@pytest.mark.usefixtures("hub_cache")
def test_hub_offline() -> None:
    refused(
        "org/name@v2",
        r"^org/name@v2: no such file or directory here, the Hub cannot be reached \(ConnectionError\), and its cache "
        "does not hold it; download it where there is a network and pass the directory$",
    )


def test_hub_offline_but_cached(t5: Path, encoder: TextEncoder, hub_cache: Path) -> None:
    snapshot = hub_cache / "models--org--name" / "snapshots" / ("a" * 40)
    shutil.copytree(t5, snapshot)
    reference = hub_cache / "models--org--name" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("a" * 40)
    cached = TextEncoder("org/name", dtype=torch.float32)
    assert torch.equal(cached(["a cat"])[0], encoder(["a cat"])[0])
    assert cached.source == "org/name"


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (
            ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"],
            ["config.json", "model.safetensors"],
        ),
        (["config.json", "pytorch_model.bin", "old/config.json"], ["config.json", "pytorch_model.bin"]),
    ],
)
def test_hub_online_fetches_one_set_of_weights(
    t5: Path, files: list[str], wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = shutil.copytree(t5, tmp_path / "snapshot")
    (snapshot / "pytorch_model.bin").touch()
    asked: list[tuple[str, list[str], str | None]] = []

    def model_info(self: Any, repo: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns, revision))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert TextEncoder("org/name@v2").width == 16
    assert asked == [("org/name", wanted, "v2")]


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("GatedRepoError", "org/name: needs permission; accept its terms on the Hub"),
        ("RevisionNotFoundError", "org/name: the Hub's org/name has no revision None"),
        ("RepositoryNotFoundError", "org/name: no such file or directory here and no such repository on the Hub"),
    ],
)
def test_hub_refuses(kind: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = getattr(huggingface_hub.errors, kind)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    refused("org/name", match)
