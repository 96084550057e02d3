"""`varpi recipes`, and the comments that `--print-recipe` keeps."""

import json
from typing import Any

import pytest
import yaml

from varpi.cli.main import main
from varpi.recipe import Recipe, find_recipe, load_recipe, method_names, read_yaml
from varpi.recipes import shipped_recipes


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def shipped(name: str) -> Recipe:
    """A recipe that ships, with data where it names none."""
    named = "source" in read_yaml(find_recipe(name)).get("data", {})
    return load_recipe(name, [] if named else ["data.source=x"])


def test_every_recipe_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "recipes").splitlines()
    assert [line.split()[0] for line in lines] == shipped_recipes()
    assert all(30 < len(line) < 145 for line in lines)
    assert any(line.startswith("llamagen-c2i-xxl ") and line.endswith("its settings from Table 7") for line in lines)


def test_a_recipe_as_it_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "recipes", "digits")
    assert "advantage_clip: 5.0      # paper, Appendix C.3" in text
    assert yaml.safe_load(text)["method"]["group_size"] == 16


def test_keys_say_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "recipes", "--keys", "va_pi").splitlines()
    assert "method.prior_weight: number, default 0.1. β (Eq. 11); 0 leaves the prior out" in "\n".join(lines)
    assert "method.reward.decode_batch: whole number, default 16. Token sequences decoded at once" in "\n".join(lines)
    assert 'training.precision: fp32 | bf16, default "fp32"' in "\n".join(lines)
    assert "training.steps: whole number, required. Optimizer updates." in lines
    for name in shipped_recipes():  # no key of a recipe is missing
        recipe = shipped(name)
        keys = [line.split(": ")[0] for line in said(capsys, "recipes", "--keys", recipe.method.name).splitlines()]
        assert set(paths(recipe.model_dump(mode="json"))) <= set(keys)


def paths(values: dict[str, Any], path: str = "") -> list[str]:
    """Of all keys whose values are no sections."""
    found = []
    for key, value in values.items():
        section = isinstance(value, dict) and key not in ("architecture", "compat") and value
        if key == "compat" and path == "method.":
            section = True
        found += paths(value, f"{path}{key}.") if section else [f"{path}{key}"] if value is not None else []
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no recipe 'nothing' ships; there are cifar10, "),
        (["--keys", "va-pi"], "no method 'va-pi'; there are ar_grpo, "),
        (["digits", "--schema"], "a recipe's name stands alone"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *arguments]) == 2
    assert message in capsys.readouterr().err


def fits(value: Any, schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    """Whether a value is as a JSON schema asks, in the words that pydantic uses."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match schema.get("type"):
        case "integer" | "number" as kind:
            if not number or (kind == "integer" and not isinstance(value, int)):
                return False
        case str(kind):
            if not isinstance(value, kinds[kind]):
                return False
    if number and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
    ):
        return False
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        for key, inner in value.items():
            of = known.get(key, others)
            if of is False or (isinstance(of, dict) and not fits(inner, of, whole)):
                return False
        if set(schema.get("required", ())) - set(value):
            return False
    return (
        ("const" not in schema or value == schema["const"])
        and value in schema.get("enum", [value])
        and ("anyOf" not in schema or any(fits(value, one, whole) for one in schema["anyOf"]))
        and ("oneOf" not in schema or sum(fits(value, one, whole) for one in schema["oneOf"]) == 1)
    )


def test_the_schema_takes_recipes_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(said(capsys, "recipes", "--schema"))
    assert schema["properties"]["method"]["oneOf"] == [{"$ref": f"#/$defs/{name}"} for name in method_names()]
    for name in shipped_recipes():
        assert fits(shipped(name).model_dump(mode="json"), schema, schema), name
    for setting in ("training.steps=0", "method.grup_size=8", "method.name=vapi", "method.prior=none", "data=3",
                    "optimizer.learning_rate=0", "method.context_noise=1.5", "lora={rank: 0}"):  # fmt: skip
        wrong = yaml.safe_load(said(capsys, "recipes", "digits"))
        *parents, last = setting.partition("=")[0].split(".")
        section = wrong
        for parent in parents:
            section = section[parent]
        section[last] = yaml.safe_load(setting.partition("=")[2])
        assert not fits(wrong, schema, schema), setting


def test_print_recipe_keeps_the_comments_that_still_hold(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "method.prior_weight=0.2", "--set", "data.source=x"]
    text = said(capsys, "train", "llamagen-c2i-xxl", "--print-recipe", *settings)
    assert text.startswith("# VA-π for LlamaGen-XXL")
    assert "  group_size: 8  # paper, Table 7\n" in text
    assert "  prior_weight: 0.2\n" in text
    assert "  betas:  # " in text
    assert yaml.safe_load(text) == load_recipe("llamagen-c2i-xxl", settings[1::2]).model_dump(mode="json")
