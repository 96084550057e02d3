"""Recipes' YAML: what it reads, and that what is damaged, ambiguous or meant to cost memory is refused in a line."""

import time
from typing import Any

import pytest
import yaml

from varpi.errors import VarpiError
from varpi.runtime.strict_yaml import DEEPEST, MOST, check_extent, parse_yaml


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: {c: [1, 2.5, yes, null], d: 'text'}\n# said\ne: |\n  two\n  lines\n",
        "[1, two]",
        "",
        "'on': 1",
        "\ufeffa: .inf",
        "a: !!set {x, y}",
        b"\xff\xfea\x00:\x00 \x001\x00",
    ],
)
def test_reads_what_yaml_reads(text: str | bytes) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\n\na: 3", "line 4, column 1: the key a is given twice, in line 1 too"),
        ("x: {a: 1, a: 1}", "line 1, column 11: the key a is given twice, in line 1 too"),
        ("5: x", "line 1, column 1: 5 is no text, as a key must be; write it in quotes"),
        ("a:\n  on: x", "line 2, column 3: on is no text, as a key must be; write it in quotes"),
        ("? [1]\n: x", "line 1, column 3: a key is no text, as a key must be; write it in quotes"),
        ("a: &x {b: 1}\nc: *x", "line 2, column 4: *x is an alias; write the value out"),
        ("a: &x [*x]", "line 1, column 8: *x is an alias; write the value out"),
        ("seed: 2024-99-99", "line 1, column 7: '2024-99-99' looks like a value of kind timestamp, but is none"),
        (f"seed: {'9' * 5000}", f"line 1, column 7: '{'9' * 40}' looks like a value of kind int, but is none"),
        ("a: !!bool maybe", "line 1, column 4: 'maybe' looks like a value of kind bool, but is none"),
        ("a: !!python/object:os.system x", "line 1, column 4: could not determine a constructor for the tag"),
        ("a: [1", "line 1, column 6: while parsing a flow sequence expected ',' or ']'"),
        ("!!map [1]", "line 1, column 1: expected a mapping node, but found sequence"),
        ("a: 1\n---\nb: 1", "line 2, column 1: expected a single document in the stream but found another"),
        ("\0", "unacceptable character #x0000: special characters are not allowed"),
        (b"\xff\xfe\x00", "unacceptable character"),
    ],
)
def test_refuses(text: str | bytes, reason: str) -> None:
    with pytest.raises(VarpiError) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(reason)
    assert "\n" not in str(caught.value)


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "is an alias"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}"), "is an alias"),
        ("[" * 200_000, f"nested deeper than {DEEPEST} levels"),
        ("{a: " * 200_000, f"nested deeper than {DEEPEST} levels"),
        ("- " * 200_000, f"nested deeper than {DEEPEST} levels"),
        (f"a: [{'1,' * 300_000}]", f"more than {MOST} keys and values"),
        ("".join(f"k{i}: 1\n" for i in range(90_000)), f"more than {MOST} keys and values"),
    ],
    ids=["aliases", "merges", "brackets", "braces", "dashes", "list", "keys"],
)
def test_small_texts_with_large_costs_are_refused_at_once(text: str, reason: str) -> None:
    begun = time.process_time()
    with pytest.raises(VarpiError, match=reason):
        parse_yaml(text)
    assert time.process_time() - begun < 5


def test_a_document_at_the_limits_is_read() -> None:
    assert parse_yaml("[" * DEEPEST + "]" * DEEPEST) is not None
    assert len(parse_yaml(f"[{'1,' * (MOST - 1)}]")) == MOST - 1


def containing_itself() -> dict[str, Any]:
    values: dict[str, Any] = {}
    values["a"] = values
    return values


def shared(depth: int = 30) -> Any:
    value: Any = [0]
    for _ in range(depth):
        value = [value] * 10
    return {"a": value}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (containing_itself(), "a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.…: nested deeper than 32 levels"),
        (shared(), "more than 10000 keys and values"),
        ({"a": {"b": [1, 2**65]}}, "a.b.1 is a number of 66 bits; whole numbers have at most 64"),
        ({"a": 10**5000}, "a is a number of 16610 bits"),
        ({"a": {5: 1}}, "a: the key 5 is no text, as a key must be"),
        ({None: 1}, "the key None is no text, as a key must be"),
    ],
)
def test_values_from_elsewhere_are_held_to_the_same(values: Any, reason: str) -> None:
    with pytest.raises(VarpiError) as caught:
        check_extent(values)
    assert str(caught.value).startswith(reason)
