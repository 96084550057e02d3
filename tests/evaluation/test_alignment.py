"""Alignment: numbers worked by hand on generators and tokenizers that are plain tables, then the tiny pair."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import tiny
import torch
from torch import Tensor, nn

from varpi import objective
from varpi.data import BadImage, Dropped, open_dataset
from varpi.data.dataset import Item
from varpi.errors import VarpiError
from varpi.evaluation import alignment
from varpi.evaluation.alignment import QUANTITIES, evaluate_alignment
from varpi.evaluation.result import Result, differences, read_result, write_result
from varpi.generators import LlamaGen
from varpi.networks.convnet import SmallConvNet
from varpi.networks.perceptual import ConvPerceptual
from varpi.sampling.settings import Sampling

CODES, TOKENS = 9, 4
SURE = 50.0  # a logit that leaves all others e**-50


class Markov(nn.Module):
    """A generator whose next logits (V,) depend on the token before alone: `first`, then `following[token]`."""

    vocab_size, grid, num_tokens, num_classes, gradient_checkpointing = CODES, 2, TOKENS, 3, False
    class_names = None
    caption_check: Any = None
    blocks = ()

    def __init__(self, first: Tensor, following: Tensor) -> None:
        super().__init__()
        self.first, self.following = nn.Parameter(first), nn.Parameter(following)

    def logits(self, tokens: Tensor, condition: Tensor) -> Tensor:
        start = self.first.expand(len(tokens), 1, CODES)
        return torch.cat([start, self.following[tokens[:, :-1]]], dim=1)

    def prepare_condition(self, condition: Any) -> Tensor:
        return torch.zeros(len(condition)) if isinstance(condition, list) else condition

    def new_cache(self, batch_size: int, *, static: bool = False) -> None:
        return None

    def prefill(self, condition: Tensor, cache: None) -> Tensor:
        return self.first.expand(len(condition), CODES)

    def decode_step(self, tokens: Tensor, position: Tensor, cache: None) -> Tensor:
        return self.following[tokens]


def constant(logits: Tensor) -> Any:
    return Markov(logits, logits.repeat(CODES, 1))


def copier() -> Any:
    """Begins with token 0, then repeats the token before."""
    return Markov(SURE * torch.eye(CODES)[0], SURE * torch.eye(CODES))


class Exact:
    """A tokenizer without loss: token t of 9 is a gray pixel of t/4 - 1."""

    codebook_size, downsample = CODES, 1

    def encode(self, images: Tensor) -> Tensor:
        return ((images[:, 0] + 1) * 4).round().long().flatten(1)

    def decode(self, tokens: Tensor) -> Tensor:
        return (tokens.float() / 4 - 1).view(-1, 1, 2, 2).repeat(1, 3, 1, 1)


class Even(Exact):
    """Its encoder knows even tokens only and takes an odd one for the one below."""

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images) // 2 * 2


class Rows:
    """A dataset of images whose pixels are the given tokens, all of class 1, some of them unusable."""

    num_classes, class_names, fingerprint = 3, None, ""

    def __init__(self, rows: Sequence[Sequence[int]], bad: Sequence[int] = (), dropped: Sequence[int] = ()) -> None:
        self.images = Exact().decode(torch.tensor(rows, dtype=torch.int64).view(-1, TOKENS))
        self.bad, self.dropped = bad, dropped

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        if index in self.bad:
            raise BadImage(f"image {index} is torn")
        if index in self.dropped:
            raise Dropped(f"image {index} has no caption")
        return Item(self.images[index], 1)


class Pixels:
    """An extractor whose features are the pixels of the first channel, in [0,1]; it keeps what it saw."""

    name, identity, streams = "pixels", {"sha256": "none"}, {"pool": TOKENS}

    def __init__(self, *warnings: str) -> None:
        self.warnings = warnings
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        self.seen.append(images)
        return {"pool": images[:, 0].flatten(1).float() / 255}


def evaluate(generator: Any, tokenizer: Any, dataset: Any, **settings: Any) -> Result:
    return evaluate_alignment(generator, tokenizer, dataset, **{"extractor": Pixels(), **settings})


@pytest.fixture(scope="module")
def images(pair: Path) -> Any:
    return open_dataset(str(pair / "images"), image_size=tiny.IMAGE_SIZE, split="validation")


# -- by hand


def test_an_untrained_generator_is_uniform(images: Any) -> None:
    generator = LlamaGen(tiny.GENERATOR)  # its output layer is zero
    result = evaluate(generator, tiny.tokenizer(), images, prior_weight=0.5)
    assert list(result.metrics) == list(QUANTITIES)
    uniform = math.log(32)
    metrics = result.metrics
    assert metrics["prior_term"] == pytest.approx(uniform, abs=1e-6)
    assert metrics["lower_bound"] == pytest.approx(metrics["reconstruction_reward"] - 0.5 * uniform, abs=1e-6)
    assert metrics["entropy_gap"] == pytest.approx(0, abs=1e-6)
    assert metrics["log_likelihood_gap"] == pytest.approx(0, abs=1e-6)
    curves = result.details["curves"]
    for side in ("real", "free"):
        assert curves[f"entropy_{side}"] == pytest.approx([uniform] * 16, abs=1e-6)
        assert curves[f"log_likelihood_{side}"] == pytest.approx([-uniform] * 16, abs=1e-6)


def test_a_known_distribution() -> None:
    logits = torch.linspace(-1, 2, CODES)
    log_p = logits.double().log_softmax(0)
    rows = torch.tensor([[0, 3, 8, 8], [1, 1, 2, 5], [7, 0, 4, 6]])
    result = evaluate(constant(logits), Exact(), Rows(rows.tolist()))
    likelihood = log_p[rows]
    entropy = -(log_p.exp() * log_p).sum().item()
    assert result.details["curves"]["entropy_real"] == pytest.approx([entropy] * TOKENS, abs=1e-6)
    assert result.details["curves"]["entropy_free"] == pytest.approx([entropy] * TOKENS, abs=1e-6)
    assert result.details["curves"]["log_likelihood_real"] == pytest.approx(likelihood.mean(0).tolist(), abs=1e-6)
    assert result.details["log_likelihood_real"] == pytest.approx(likelihood.mean().item(), abs=1e-6)
    assert result.metrics["prior_term"] == pytest.approx(-likelihood.mean().item(), abs=1e-6)
    error = likelihood.mean(1).std().item() / math.sqrt(3)
    assert result.details["standard_errors"]["prior_term"] == pytest.approx(error, abs=1e-6)
    gap = result.details["log_likelihood_free"] - result.details["log_likelihood_real"]
    assert result.metrics["log_likelihood_gap"] == pytest.approx(gap, abs=1e-9)


def test_a_generator_that_copies_its_prefix() -> None:
    # From [a, b, c, d] it draws [0, a, b, c] under teacher forcing, and nothing but zeros alone.
    rows = [[0, 4, 4, 8], [0, 0, 8, 8], [4, 4, 4, 4]]
    result = evaluate(copier(), Exact(), Rows(rows), samples_per_image=3, mse_weight=2.0)
    mse = ((1 + 1) / 4 + 4 / 4 + 1 / 4) / 3  # pixels differ by 0 1 0 1, by 0 0 2 0, and by 1 0 0 0
    assert result.details["distances"] == pytest.approx({"mse": mse}, abs=1e-6)
    assert result.metrics["reconstruction_reward"] == pytest.approx(-2 * mse, abs=1e-6)
    surprises = (2 + 1 + 1) / 3
    assert result.metrics["prior_term"] == pytest.approx(SURE * surprises / 4, abs=1e-4)
    assert result.metrics["log_likelihood_gap"] == pytest.approx(SURE * surprises / 4, abs=1e-4)
    assert result.details["curves"]["log_likelihood_real"] == pytest.approx(
        [-SURE / 3, -SURE / 3, -SURE / 3, -SURE / 3]
    )
    assert result.metrics["entropy_gap"] == pytest.approx(0, abs=1e-6)
    # The free-running side is a point, black; so the distance is a squared mean and a trace. Token 4 is saved as 128.
    teacher = torch.tensor([[0, 0, 4, 4], [0, 0, 0, 8], [0, 4, 4, 4]]).double() * (128 / 255 / 4)
    teacher[1, 3] = 1
    by_hand = teacher.mean(0).square().sum() + teacher.var(0).sum()
    assert result.metrics["teacher_free_distance"] == pytest.approx(by_hand.item(), abs=1e-6)


def test_context_noise_reaches_the_prior_and_the_samples_but_not_the_gaps() -> None:
    zeros = Rows([[0] * TOKENS] * 5)
    clean = evaluate(copier(), Exact(), zeros)
    assert clean.metrics["prior_term"] == pytest.approx(0, abs=1e-6)
    assert clean.metrics["reconstruction_reward"] == 0
    noisy = evaluate(copier(), Exact(), zeros, context_noise=1.0)  # no token of the context is the true one
    assert noisy.metrics["prior_term"] == pytest.approx(SURE * 3 / 4, abs=1e-4)
    assert noisy.metrics["reconstruction_reward"] < -0.75 / 16  # three of four pixels are off by 1/4 at least
    assert noisy.details["log_likelihood_real"] == pytest.approx(0, abs=1e-6)
    assert noisy.metrics["teacher_free_distance"] > clean.metrics["teacher_free_distance"] == 0


def test_round_trip() -> None:
    rows = Rows([[1, 2, 3, 4], [0, 1, 2, 8]])
    exact = evaluate(constant(torch.zeros(CODES)), Exact(), rows)
    for suffix in ("", "_real"):
        numbers = {**exact.metrics, **exact.details}
        assert numbers[f"round_trip_distance{suffix}"] == numbers[f"round_trip_changed{suffix}"] == 0
    # Token 3 alone: encoded as 2, a quarter darker. The real tokens are even already once the encoder gave them.
    lossy = evaluate(constant(SURE * torch.eye(CODES)[3]), Even(), rows)
    assert lossy.metrics["round_trip_changed"] == 1
    assert lossy.metrics["round_trip_distance"] == pytest.approx(1 / 16)
    assert lossy.details["round_trip_changed_real"] == 0
    half = evaluate(Markov(SURE * torch.eye(CODES)[1], SURE * torch.eye(CODES).roll(1, 1)), Even(), rows)  # 1 2 3 4
    assert half.metrics["round_trip_changed"] == 0.5
    assert half.metrics["round_trip_distance"] == pytest.approx(1 / 32)


def test_perceptual_distance_is_part_of_the_reward(images: Any) -> None:
    torch.manual_seed(7)
    perceptual = ConvPerceptual(SmallConvNet((8, 8)))
    settings = {"mse_weight": 0.5, "perceptual_weight": 3.0, "samples_per_image": 2}
    result = evaluate(tiny.generator(), tiny.tokenizer(), images, perceptual=perceptual, **settings)
    distances = result.details["distances"]
    assert distances["mse"] > 0
    assert distances["perceptual"] > 0
    expected = -0.5 * distances["mse"] - 3 * distances["perceptual"]
    assert result.metrics["reconstruction_reward"] == pytest.approx(expected, abs=1e-6)
    other = ConvPerceptual(SmallConvNet((8, 8)))
    another = evaluate(tiny.generator(), tiny.tokenizer(), images, perceptual=other, **settings)
    with pytest.raises(VarpiError, match=r"another evaluator \(perceptual\)"):
        differences({"one": result, "another": another})


# -- against the functions of training


def by_class(images: Any) -> tuple[LlamaGen, Any]:
    return tiny.generator(), images


def by_text(images: Any) -> tuple[LlamaGen, Any]:
    """Features of captions of different lengths."""

    class Captioned:
        num_classes = class_names = None
        fingerprint = ""

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> Item:
            draws = torch.Generator().manual_seed(index)
            return Item(images[index].image, torch.randn(2 + index, 16, generator=draws))

    config = replace(tiny.GENERATOR, conditioning="text", condition_tokens=10, caption_dim=16)
    return tiny.generator(config), Captioned()


@pytest.mark.parametrize("kind", [by_class, by_text])
def test_the_prior_term_is_the_cross_entropy_of_training(kind: Callable[..., Any], images: Any) -> None:
    generator, dataset = kind(images)
    tokenizer = tiny.tokenizer()
    result = evaluate(generator, tokenizer, dataset)
    items = [dataset[i] for i in range(len(dataset))]
    conditions = [item.condition for item in items]
    with torch.no_grad():
        targets = tokenizer.encode(torch.stack([item.image for item in items]))
        logits = generator.logits(targets, generator.prepare_condition(conditions))
        assert result.metrics["prior_term"] == pytest.approx(objective.prior_loss(logits, targets).item(), abs=1e-5)
        assert result.details["entropy_real"] == pytest.approx(objective.entropy(logits).item(), abs=1e-5)
        shifted = generator.logits(targets, generator.prepare_condition(conditions[1:] + conditions[:1]))
    assert objective.prior_loss(shifted, targets).item() != pytest.approx(result.metrics["prior_term"], abs=1e-3)


@pytest.mark.parametrize("kind", [by_class, by_text])
def test_batch_size_changes_nothing(kind: Callable[..., Any], images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "HELD", 4)  # of 6 images, so that there are two blocks
    generator, dataset = kind(images)
    results = [
        evaluate(generator, tiny.tokenizer(), dataset, batch_size=size, context_noise=0.3, samples_per_image=3)
        for size in (1, 3, 100)
    ]
    for result in results[1:]:
        assert result.metrics == pytest.approx(results[0].metrics, abs=1e-6)
        assert result.samples == results[0].samples
        assert result.reference == results[0].reference
        for name, curve in result.details["curves"].items():
            assert curve == pytest.approx(results[0].details["curves"][name], abs=1e-6)


def test_overfitting_shows(pair: Path, images: Any) -> None:
    generator, tokenizer = tiny.generator().train(), tiny.tokenizer()
    unseen = open_dataset(str(pair / "images"), image_size=tiny.IMAGE_SIZE, split="train")
    items = [images[i] for i in range(len(images))]
    targets = tokenizer.encode(torch.stack([item.image for item in items]))
    condition = generator.prepare_condition([item.condition for item in items])
    for module in generator.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    for _ in range(140):
        optimizer.zero_grad()
        objective.prior_loss(generator.logits(targets, condition), targets).backward()
        optimizer.step()
    known, new = (evaluate(generator, tokenizer, dataset) for dataset in (images, unseen))
    assert generator.training
    assert known.metrics["prior_term"] < 0.5
    assert new.metrics["prior_term"] > 3
    # Its own samples are far likelier than images it has not seen, and about as likely as those it knows by heart.
    assert new.metrics["log_likelihood_gap"] > 2
    assert abs(known.metrics["log_likelihood_gap"]) < 0.5
    # It is surer of its own prefixes than of ones it has not seen.
    assert new.metrics["entropy_gap"] < -0.05
    assert abs(known.metrics["entropy_gap"]) < 0.05


# -- draws


def test_seeds(images: Any) -> None:
    state = torch.get_rng_state()
    seeds = (Sampling(seed=3), Sampling(seed=3), Sampling(seed=4))
    one, same, other = (evaluate(tiny.generator(), tiny.tokenizer(), images, sampling=seed) for seed in seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert same == one
    assert other.metrics["reconstruction_reward"] != one.metrics["reconstruction_reward"]
    assert other.samples["sha256"] != one.samples["sha256"]
    # The images are the same and the terms that no draw enters too.
    assert other.reference == one.reference
    assert other.metrics["prior_term"] == one.metrics["prior_term"]
    assert differences({"one": one, "other": other}) == ["sampling.seed: one 3, other 4"]


def test_each_image_has_its_own_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "HELD", 6)
    extractor = Pixels()
    same = Rows([[0] * TOKENS] * 12)
    evaluate(constant(torch.zeros(CODES)), Exact(), same, extractor=extractor, batch_size=6)
    teacher, free = (torch.cat(extractor.seen[i::2])[:, 0].flatten(1) for i in (0, 1))
    for samples in (teacher, free):
        assert len(samples.unique(dim=0)) > 9  # of 12 drawn among 9**4
    assert (teacher != free).any(dim=1).all()


def test_more_images_leave_the_draws_of_the_first_as_they_are() -> None:
    few, many = Pixels(), Pixels()
    rows = Rows([[i % CODES] * TOKENS for i in range(12)])
    for extractor, count in ((few, 5), (many, 9)):
        evaluate(constant(torch.zeros(CODES)), Exact(), rows, extractor=extractor, images=count)
    assert all(torch.equal(more[:5], less) for less, more in zip(few.seen, many.seen, strict=True))


def test_sampling_settings_shape_the_free_running_samples_alone(images: Any) -> None:
    generator, tokenizer = tiny.generator(), tiny.tokenizer()
    plain = evaluate(generator, tokenizer, images)
    greedy = evaluate(generator, tokenizer, images, sampling=Sampling(greedy=True, guidance_scale=2.0))
    assert greedy.details["log_likelihood_free"] > plain.details["log_likelihood_free"]
    for name in ("reconstruction_reward", "prior_term"):
        assert greedy.metrics[name] == plain.metrics[name]
    assert plain.sampling is not None
    assert greedy.sampling == {**plain.sampling, "greedy": True, "guidance_scale": 2.0}
    assert plain.sampling["temperature"] == 1.0
    assert differences({"a": plain, "b": greedy}) == [
        "sampling.greedy: a false, b true",
        "sampling.guidance_scale: a 1.0, b 2.0",
    ]


def test_dropout_stays_out_and_modes_are_put_back(pair: Path, images: Any) -> None:
    generator, tokenizer = tiny.generator(), tiny.tokenizer()
    expected = evaluate(generator, tokenizer, images)
    generator.train()
    tokenizer.train()
    assert evaluate(generator, tokenizer, images) == expected
    assert generator.training
    assert tokenizer.training
    larger = open_dataset(str(pair / "images"), image_size=32, split="validation")
    with pytest.raises(VarpiError, match="4x4 grid"):
        evaluate(generator, tokenizer, larger)
    assert generator.training


# -- which images, and what is recorded


def test_unusable_images_are_left_out_and_counted() -> None:
    rows = [[i] * TOKENS for i in range(CODES)]
    result = evaluate(constant(torch.arange(CODES).float()), Exact(), Rows(rows, bad=[2, 5], dropped=[7]))
    left_out = {"unreadable": (2, ANY), "not to be used": (1, "image 7 has no caption")}
    assert result.details["images"] == {"used": 6, "left_out": left_out}
    assert result.samples["count"] == 6
    log_p = torch.arange(CODES).double().log_softmax(0)
    assert result.metrics["prior_term"] == pytest.approx(-log_p[[0, 1, 3, 4, 6, 8]].mean().item(), abs=1e-6)
    (warning,) = result.warnings
    assert warning.startswith("left out 3 of 9 images: ")
    assert re.search(r"2 unreadable \(image [25] is torn\)", warning)
    assert "1 not to be used (image 7 has no caption)" in warning


def test_captions_that_the_generator_cannot_use_are_left_out() -> None:
    class Captions(Rows):
        num_classes = None

        def __getitem__(self, index: int) -> Item:
            return Item(self.images[index], f"caption {index}")

        def name(self, index: int) -> str:
            return f"item {index}"

    def no_seven(caption: str, name: str) -> None:
        if "7" in caption:
            raise Dropped(f"{name}: is seven", "with a seven")

    generator = constant(torch.arange(CODES).float())
    generator.caption_check = no_seven
    result = evaluate(generator, Exact(), Captions([[i] * TOKENS for i in range(CODES)]))
    assert result.details["images"] == {"used": 8, "left_out": {"with a seven": (1, "item 7: is seven")}}
    assert result.warnings == ["left out 1 of 9 images: 1 with a seven (item 7: is seven)"]


def test_images_are_taken_across_the_dataset_and_only_as_many_as_asked() -> None:
    rows = [[i // 100] * TOKENS for i in range(800)]  # sorted, as class folders are
    seen = []
    result = evaluate(constant(torch.zeros(CODES)), Exact(), Rows(rows, bad=range(0, 800, 4)), images=40)
    assert result.details["images"]["used"] == 40
    dataset = Rows(rows)
    for block in alignment._Items(dataset, 40).blocks():
        seen += [int(Exact().encode(item.image[None])[0, 0]) for item in block]
    assert set(seen) == set(range(8))


def test_warnings_of_too_few_images() -> None:
    extractor = Pixels("its weights are unknown")
    result = evaluate(constant(torch.zeros(CODES)), Exact(), Rows([[0] * TOKENS] * 4), extractor=extractor, images=6)
    assert [warning.split(";")[0] for warning in result.warnings] == [
        "its weights are unknown",
        "teacher_free_distance: 4 images are too few for 4 features, and bias it upwards",
        "6 images were asked for, 4 are usable",
    ]
    assert not evaluate(constant(torch.zeros(CODES)), Exact(), Rows([[0] * TOKENS] * 5)).warnings


def test_the_record_holds_what_moves_the_numbers(images: Any, tmp_path: Path) -> None:
    settings = {"context_noise": 0.25, "samples_per_image": 2, "prior_weight": 0.3}
    result = evaluate(tiny.generator(), tiny.tokenizer(), images, **settings)
    write_result(tmp_path / "result.json", result)
    assert read_result(tmp_path / "result.json") == result
    assert result.kind == "alignment"
    assert result.evaluator == {
        "extractor": {"sha256": "none"},
        "mse_weight": 1.0,
        "perceptual_weight": 0.0,
        "perceptual": None,
        **settings,
    }
    assert result.samples["image_size"] == tiny.IMAGE_SIZE
    fewer = evaluate(tiny.generator(), tiny.tokenizer(), images, **settings, images=5)
    with pytest.raises(VarpiError, match=r"another reference \(count, sha256\)"):
        differences({"all": result, "fewer": fewer})


# -- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_noise": 1.5}, r"context_noise is 1.5; it must be in \[0, 1\]"),
        ({"context_noise": -0.1}, r"context_noise is -0.1"),
        ({"context_noise": float("nan")}, r"context_noise is nan"),
        ({"images": 1}, "images is 1; the Fréchet distance needs at least 2"),
        ({"samples_per_image": 0}, "samples_per_image is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"prior_weight": -1.0}, "prior_weight is -1.0"),
        ({"mse_weight": 0.0}, "every reward weight is 0"),
        ({"perceptual_weight": 2.0}, "perceptual_weight is 2.0, but none was given: give both or neither"),
        ({"perceptual": object()}, "perceptual_weight is 0.0, but a perceptual distance was given"),
    ],
)
def test_refuses_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(VarpiError, match=message):
        evaluate(copier(), Exact(), Rows([[0] * TOKENS] * 3), **settings)


def test_refuses_data_without_usable_images() -> None:
    rows = [[0] * TOKENS] * 3
    with pytest.raises(VarpiError, match=r"^0 usable images \(left out 3 of 3 images: .*2 unreadable \(image"):
        evaluate(copier(), Exact(), Rows(rows, bad=[0, 1], dropped=[2]))
    with pytest.raises(VarpiError, match=r"^1 usable images \(left out 2 of 3 images: .*; the Fréchet distance needs"):
        evaluate(copier(), Exact(), Rows(rows, bad=[0, 1]))
    with pytest.raises(VarpiError, match=r"^0 usable images \(left out 0 of 0"):
        evaluate(copier(), Exact(), Rows([]))


def test_refuses_models_and_data_that_do_not_fit(pair: Path, images: Any) -> None:
    other = tiny.tokenizer(replace(tiny.TOKENIZER, codebook_size=16))
    with pytest.raises(VarpiError, match="do not belong together"):
        evaluate(tiny.generator(), other, images)
    text, _ = by_text(images)
    with pytest.raises(VarpiError, match="conditioned on text"):
        evaluate(text, tiny.tokenizer(), images)
    larger = open_dataset(str(pair / "images"), image_size=32, split="validation")
    with pytest.raises(VarpiError, match="4x4 grid"):
        evaluate(tiny.generator(), tiny.tokenizer(), larger)


def test_refuses_a_generator_that_diverged(images: Any) -> None:
    generator = tiny.generator()
    nn.init.constant_(generator.output.weight, math.nan)
    with pytest.raises(VarpiError, match="not finite"):
        evaluate(generator, tiny.tokenizer(), images)
