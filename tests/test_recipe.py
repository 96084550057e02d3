"""Recipes: those that ship are whole, and a wrong one is refused with a line that names the key and what it must be."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from varpi.errors import VarpiError
from varpi.methods.va_pi import Settings as VaPi
from varpi.recipe import Recipe, load_recipe, parse_recipe, read_yaml, shipped_recipes
from varpi.studies.demo import MODELS

VALUES: dict[str, Any] = {
    "method": {"name": "va_pi"},
    "generator": {"source": "g.safetensors"},
    "tokenizer": {"source": "t.safetensors"},
    "data": {"source": "images", "image_size": 64},
    "optimizer": {"learning_rate": 1e-6},
    "training": {"steps": 10, "batch_size": 8},
}


def changed(**dotted: Any) -> dict[str, Any]:
    """VALUES with section__key=value replaced; None removes the key."""
    values = copy.deepcopy(VALUES)
    for path, value in dotted.items():
        *parents, last = path.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is None:
            del section[last]
        else:
            section[last] = value
    return values


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(VarpiError) as caught:
        parse_recipe(values, "my.yaml")
    return str(caught.value)


def test_shipped_names() -> None:
    assert {"digits", "digits-next-token", "digits-generator", "llamagen-c2i-xl", "llamagen-c2i-xxl"} <= set(
        shipped_recipes()
    )


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_parses_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_papers_settings() -> None:
    """Paper, Table 7 and Eq. 10-11; released launchers for ε."""
    recipe = load_recipe("llamagen-c2i-xxl")
    assert isinstance(recipe.method, VaPi)
    assert (recipe.method.group_size, recipe.method.prior_weight, recipe.method.clip_range) == (8, 0.1, 0.2)
    assert (recipe.method.reward.mse_weight, recipe.method.reward.perceptual_weight) == (1.0, 1.0)
    assert recipe.method.reward.perceptual == "lpips-vgg"
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (1e-6, 1e-4)
    assert (recipe.training.batch_size, recipe.training.steps) == (128, 100)
    assert (recipe.data.image_size, recipe.training.precision) == (384, "bf16")


@pytest.mark.parametrize(
    ("name", "noise", "image_size", "steps", "rate"),
    [("llamagen-t2i-xl", 0.5, 256, 200, 1e-6), ("janus-pro-1b", 0.95, 384, 100, 1e-7)],
)
def test_the_papers_settings_for_text(name: str, noise: float, image_size: int, steps: int, rate: float) -> None:
    """Table 7."""
    recipe = load_recipe(name)
    assert isinstance(recipe.method, VaPi)
    assert (recipe.method.group_size, recipe.method.prior_weight, recipe.method.context_noise) == (8, 0.1, noise)
    assert recipe.method.reward.perceptual == "lpips-vgg"
    assert (recipe.data.image_size, recipe.training.steps, recipe.training.batch_size) == (image_size, steps, 128)
    assert recipe.optimizer.learning_rate == rate
    assert recipe.method.compat == VaPi(name="va_pi").compat


def test_the_released_settings_for_text() -> None:
    janus = load_recipe("janus-pro-1b-compat")
    assert isinstance(janus.method, VaPi)
    assert janus.generator is not None
    assert janus.generator.compat == {"shifted_logits": True}
    assert (janus.method.context_noise, janus.method.reward.perceptual) == (1.0, "lpips-alex")
    assert janus.training.batch_size == 64
    llamagen = load_recipe("llamagen-t2i-xl-compat").method
    assert isinstance(llamagen, VaPi)
    assert llamagen.compat.uniform_noise
    assert llamagen.compat.rollout_in_eval


def test_a_stream_has_no_caption_features() -> None:
    with pytest.raises(VarpiError, match="caption_features cannot be looked up for a stream"):
        load_recipe("janus-pro-1b", ["data.caption_features=features"])
    with pytest.raises(VarpiError, match="shuffle_buffer is for streams"):
        load_recipe("llamagen-t2i-xl", ["data.shuffle_buffer=10"])


def test_the_trainings_of_the_demo_differ_in_their_method_alone() -> None:
    tuned, *others = (load_recipe(model.recipe).model_dump() for model in MODELS.values())
    assert len(others) == 2
    for other in others:
        assert {key for key in tuned if tuned[key] != other[key]} == {"method"}


def test_defaults_are_filled_in_and_written_out() -> None:
    recipe = parse_recipe(VALUES)
    assert isinstance(recipe.method, VaPi)
    assert recipe.method.group_size == 8
    written = yaml.safe_load(recipe.to_yaml())
    assert written["method"]["reward"]["decode_batch"] == 16
    assert written["optimizer"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"method__grup_size": 4}, "my.yaml: unknown key method.grup_size; did you mean group_size?"),
        ({"optimizer__lerning_rate": 1}, "my.yaml: unknown key optimizer.lerning_rate; did you mean learning_rate?"),
        (
            {"method__reward__perceptual_wieght": 1},
            "my.yaml: unknown key method.reward.perceptual_wieght; did you mean perceptual_weight?",
        ),
        ({"trainning": {}}, "my.yaml: unknown key trainning; did you mean training?"),
        (
            {"generator__zzz": 1},
            "my.yaml: unknown key generator.zzz; the keys here are source, architecture, dropout, text_encoder, compat",
        ),
    ],
)
def test_unknown_key_names_the_nearest(change: dict[str, Any], line: str) -> None:
    assert refusal(changed(**change)) == line


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"training__steps": "many"}, "my.yaml: training.steps is 'many'; it must be a valid integer"),
        ({"training__steps": True}, "my.yaml: training.steps is True; it must be a whole number"),
        ({"training__steps": 1.5}, "my.yaml: training.steps is 1.5; it must be a valid integer"),
        ({"training__steps": 0}, "my.yaml: training.steps is 0; it must be greater than or equal to 1"),
        ({"data__source": 5}, "my.yaml: data.source is 5; it must be a valid string"),
        ({"optimizer__learning_rate": -1.0}, "my.yaml: optimizer.learning_rate is -1.0; it must be greater than 0"),
        ({"optimizer__learning_rate": float("nan")}, "my.yaml: optimizer.learning_rate is nan; it must be"),
        ({"optimizer__betas": [0.9, 1.0]}, "my.yaml: optimizer.betas.1 is 1.0; it must be less than 1"),
        ({"optimizer__betas": [0.9]}, "my.yaml: optimizer.betas.1 is missing"),
        ({"method__reward__mse_weight": -0.5}, "my.yaml: method.reward.mse_weight is -0.5; it must be greater than or"),
        ({"method__prior_weight": -0.1}, "my.yaml: method.prior_weight is -0.1; it must be greater than or equal to 0"),
        ({"method__group_size": 1}, "my.yaml: method: group_size is 1; the policy estimator compares at least 2"),
        ({"method__context_noise": 1.5}, "my.yaml: method.context_noise is 1.5; it must be less than or equal to 1"),
        ({"method__clip_range": 0}, "my.yaml: method.clip_range is 0; it must be greater than 0"),
        ({"method__prior": "l2"}, "my.yaml: method.prior is 'l2'; it must be 'cross_entropy', 'kl' or 'guided'"),
        ({"training__precision": "fp16"}, "my.yaml: training.precision is 'fp16'; it must be 'fp32' or 'bf16'"),
        ({"seed": 2**64}, "my.yaml: seed is a number of 65 bits; whole numbers have at most 64"),
        ({"training__batch_size": 2**21}, "my.yaml: training.batch_size is 2097152; it must be less than or equal to"),
        (
            {"training__steps": 2**32},
            "my.yaml: training.steps is 4294967296; it must be less than or equal to 2147483648",
        ),
        ({"data__image_size": 20_000}, "my.yaml: data.image_size is 20000; it must be less than or equal to 16384"),
        ({"data__workers": 5_000}, "my.yaml: data.workers is 5000; it must be less than or equal to 1024"),
        ({"method__group_size": 5_000}, "my.yaml: method.group_size is 5000; it must be less than or equal to 4096"),
        ({"method__reward__decode_batch": 2**30}, "my.yaml: method.reward.decode_batch is 1073741824; it must be less"),
        ({"se" * 999: 1}, f"my.yaml: unknown key {'se' * 20}; the keys here are method, data, optimizer"),
        ({"seed": -1}, "my.yaml: seed is -1; it must be greater than or equal to 0"),
        (
            {"method__name": "ppo"},
            "my.yaml: method.name is 'ppo'; it must be one of 'ar_grpo', 'cca', 'classifier'",
        ),
        (
            {"method__name": "rewards"},
            "my.yaml: method.name is 'rewards'; it must be one of 'ar_grpo', 'cca', 'classifier'",
        ),
        (
            {"method__name": ["va_pi"]},
            "my.yaml: method.name is ['va_pi']; it must be one of 'ar_grpo', 'cca', 'classifier'",
        ),
        ({"method": ["va_pi"]}, "my.yaml: method is ['va_pi']; it must be a section of keys and values"),
        ({"method__name": None}, "my.yaml: method.name is missing"),
        ({"data__source": None}, "my.yaml: data.source is missing"),
        ({"optimizer": None}, "my.yaml: optimizer is missing"),
        ({"training": 7}, "my.yaml: training is 7; it must be a section of keys and values"),
        ({"generator__architecture": 5}, "my.yaml: generator.architecture is 5; it must be a name or a mapping"),
    ],
)
def test_wrong_values_are_explained(change: dict[str, Any], line: str) -> None:
    message = refusal(changed(**change))
    assert message.startswith(line)
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"generator": None}, "method va_pi needs a generator"),
        (
            {"training__batch_size": 2**20, "data__image_size": 4096},
            "training.batch_size is 1048576 and data.image_size 4096: an update of more than 68719476736 pixels",
        ),
        ({"method": {"name": "classifier"}}, "method classifier has no generator"),
        ({"generator": {"architecture": {"dim": 8}}}, "generator.source is missing: va_pi post-trains"),
        ({"tokenizer": {}}, "tokenizer.source is missing: va_pi post-trains a pretrained pair"),
        (
            {"tokenizer": {}, "method": {"name": "next_token"}},
            "tokenizer.source is missing: give a checkpoint, or an architecture",
        ),
        (
            {"method__reward": {"mse_weight": 0, "perceptual_weight": 0}},
            "method.reward: every weight is 0; at least one must be positive",
        ),
        (
            {"method__reward": {"perceptual_weight": 0, "perceptual_weights": "vgg.pth"}},
            "method.reward: perceptual_weights is given but no LPIPS network is used",
        ),
        (
            {"method__compat": {"rollout_in_eval": True}, "method__policy_mode": "eval"},
            "method: compat.rollout_in_eval needs policy_mode: train",
        ),
        ({"method__compat": {"uniform_noise": True}}, "method: compat.uniform_noise is set but context_noise is 0"),
        (
            {"method": {"name": "classifier"}, "generator": None, "tokenizer": None, "training__compile": True},
            "training.compile is for generators; method classifier trains none",
        ),
        ({"training__updates_per_batch": 3}, "training: steps is 10; it must be a multiple of updates_per_batch"),
        (
            {"training__updates_per_batch": 2, "training__save_every": 5},
            "training: save_every is 5; it must be a multiple of updates_per_batch",
        ),
        (
            {"training__updates_per_batch": 2, "validation": {"every": 5}},
            "validation.every is 5; it must be a multiple of training.updates_per_batch",
        ),
        (
            {"training__updates_per_batch": 2, "method": {"name": "next_token"}},
            "training.updates_per_batch is 2, but method next_token has no rollouts to reuse",
        ),
    ],
)
def test_contradictions(change: dict[str, Any], line: str) -> None:
    assert refusal(changed(**change)).startswith(f"my.yaml: {line}")


def test_every_mistake_has_its_line() -> None:
    message = refusal(changed(method__group_size=1, training__steps=0, sead=3))
    assert len(message.splitlines()) == 3
    assert all(line.startswith("my.yaml: ") for line in message.splitlines())


def test_a_thousand_mistakes_are_not_a_thousand_lines() -> None:
    message = refusal(changed(data__caption_column=list(range(1000))))
    assert len(message.splitlines()) == 21
    assert message.splitlines()[-1] == "my.yaml: 981 more mistakes"


def test_values_that_contain_themselves_are_refused() -> None:
    values = changed(generator={"architecture": {"dim": 8}})
    values["generator"]["architecture"]["more"] = values
    assert refusal(values).startswith("my.yaml: ")
    assert "nested deeper than 32 levels" in refusal(values)


# -- files and settings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def test_settings_are_yaml_and_typed(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            "method.group_size=4",
            "optimizer.learning_rate=1e-5",
            "optimizer.betas=[0.8, 0.9]",
            "validation.every=5",
            "training.save_every=null",
            "generator.architecture={dim: 8, n_layer: 1, n_head: 2}",
            "data.source=a=b",
        ],
    )
    assert isinstance(recipe.method, VaPi)
    assert recipe.method.group_size == 4
    assert recipe.optimizer.learning_rate == 1e-5
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.validation is not None
    assert recipe.validation.every == 5
    assert recipe.training.save_every is None
    assert recipe.generator is not None
    assert recipe.generator.architecture == {"dim": 8, "n_layer": 1, "n_head": 2}
    assert recipe.data.source == "a=b"


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("method.group_size=four", "my.yaml: method.group_size is 'four'; it must be a valid integer"),
        ("method.group_size=", "my.yaml: method.group_size is None; it must be"),
        ("method.gruop_size=4", "my.yaml: unknown key method.gruop_size; did you mean group_size?"),
        ("training.steps.more=4", "--set training.steps.more: steps is not a section"),
        ("method=fast", "my.yaml: method is 'fast'; it must be a section of keys and values"),
        ("steps", "--set 'steps': expected key.path=value"),
        ("=4", "--set '=4': expected key.path=value"),
        ("seed=[1", "--set seed: '[1' is not a YAML value (line 1, column 3: while parsing a flow sequence"),
        ("seed=2024-99-99", "--set seed: '2024-99-99' is not a YAML value (line 1, column 1: '2024-99-99' looks like"),
        (f"{'a.' * 5000}b=1", "my.yaml: a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.…: nested deeper than 32 levels"),
    ],
)
def test_wrong_settings(file: Path, setting: str, line: str) -> None:
    with pytest.raises(VarpiError) as caught:
        load_recipe(file, [setting])
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_nearest_recipe(tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=r"no recipe 'digit': neither a file .* did you mean digits\?"):
        load_recipe("digit")
    with pytest.raises(VarpiError, match=r"the shipped ones are .*digits"):
        load_recipe(tmp_path / "zzzzzzzzzzz.yaml")


def test_a_recipe_is_a_regular_file_of_a_modest_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for path in (tmp_path / "pipe.yaml", tmp_path / "folder.yaml", Path("/dev/zero")):
        with pytest.raises(VarpiError, match=f"{path}: is no regular file"):
            load_recipe(path)
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(VarpiError, match=r"large\.yaml: has 1048577 bytes; a recipe has at most 1048576"):
        load_recipe(tmp_path / "large.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 2024-99-99", "(line 1, column 7: '2024-99-99' looks like a value of kind timestamp, but is none)"),
        ("seed: 1\nseed: 2", "(line 2, column 1: the key seed is given twice, in line 1 too)"),
        ("5: 1", "(line 1, column 1: 5 is no text, as a key must be; write it in quotes)"),
        (f"seed: 0x{'F' * 6000}", "(seed is a number of 24000 bits; whole numbers have at most 64)"),
    ],
)
def test_yaml_that_is_refused(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(VarpiError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: cannot be read as YAML {line}"


@pytest.mark.parametrize("content", [b"a: [1", b"\xff\xfe\x00", b"a: !!python/object:os.system x"])
def test_bad_yaml_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(VarpiError, match="cannot be read as YAML") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "hello"])
def test_yaml_that_is_no_mapping(tmp_path: Path, content: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(content)
    with pytest.raises(VarpiError, match="a recipe is a mapping of sections, not "):
        read_yaml(path)


def test_recipes_are_values() -> None:
    """Equal when their contents are, and not to be changed."""
    recipe = parse_recipe(VALUES)
    assert recipe == parse_recipe(copy.deepcopy(VALUES))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    assert isinstance(recipe, Recipe)
