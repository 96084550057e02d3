"""Files of prompts, and GenEval's metadata."""

import json
from pathlib import Path

import pytest

from varpi.data.prompts import read_geneval_metadata, read_prompts
from varpi.errors import VarpiError


def file(tmp_path: Path, name: str, text: str) -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "\ufeffa red dog\r\n\n  a cat \n", ["a red dog", "a cat"]),
        ("a.jsonl", '{"prompt": "1"}\n{"text": "2"}\n\n{"Prompt": "3"}\n{"caption": "4"}\n', ["1", "2", "3", "4"]),
        ("a.jsonl", '{"prompt": "one\u2028line"}\n', ["one\u2028line"]),
        ("a.json", '["a cat", {"prompt": "a dog"}, "a cat"]', ["a cat", "a dog"]),
        ("a.tsv", 'Prompt\tCategory\na "quoted" bond\tAbstract\n"42\tAbstract\n\n', ['a "quoted" bond', '"42']),
        ("a.tsv", "Category\tPrompt\nAbstract\tSalvador Dalí\n", ["Salvador Dalí"]),
    ],
)
def test_forms(name: str, text: str, prompts: list[str], tmp_path: Path) -> None:
    assert read_prompts(file(tmp_path, name, text)) == prompts


def test_drawbench_counts_each_prompt_once(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"draw_bench_test_{i:05d}",
            "image_num": 0,
            "conversations": [{"from": "human", "value": f"prompt {i % 200}"}, {"from": "gpt", "value": ""}],
        }
        for i in range(1000)
    ]
    assert read_prompts(file(tmp_path, "drawbench.json", json.dumps(rows))) == [f"prompt {i}" for i in range(200)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "a.txt: holds no prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"id": 3}\n', "a.jsonl, line 2: has no prompt; one of the keys prompt, text"),
        ("a.jsonl", '"a cat"\n', "line 1: has no prompt"),
        ("a.jsonl", '{"prompt"}\n', "line 1: is not JSON"),
        ("a.json", "{", "a.json: is not JSON"),
        ("a.json", '{"prompt": "a"}', "a.json: is a JSON dict; expected a list"),
        ("a.json", "[]", "a.json: holds no prompt"),
        ("a.json", '["a", " "]', "a.json, row 1: has no prompt"),
        ("a.json", '[{"conversations": []}]', "row 0: has no prompt"),
        ("a.json", '[{"conversations": [{"from": "human"}]}]', "row 0: has no prompt"),
        ("a.json", '["a", "half \\ud83d"]', "row 1: the prompt holds half a character"),
        ("a.jsonl", '{"prompt": "half \\ud83d"}', "line 1: the prompt holds half a character"),
        ("a.tsv", "", "first line has no column Prompt"),
        ("a.tsv", "prompt\na\n", "first line has no column Prompt"),
        ("a.tsv", "Category\tPrompt\nAbstract\n", "line 2: has no prompt in its column"),
        ("a.tsv", "Prompt\n", "a.tsv: holds no prompt"),
    ],
)
def test_refusals(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(VarpiError, match=message):
        read_prompts(file(tmp_path, name, text))


def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "a.txt", tmp_path / "absent.txt", tmp_path):
        with pytest.raises(VarpiError, match="cannot be read as a text file of prompts"):
            read_prompts(path)


DOG = {"class": "dog", "count": 1}


def test_geneval_metadata(tmp_path: Path) -> None:
    """A record of every task, in the form of GenEval's evaluation_metadata.jsonl."""
    cat = {"class": "cat", "count": 1}
    records = [
        {"tag": "single_object", "include": [DOG], "prompt": "a dog"},
        {"tag": "two_object", "include": [DOG, cat], "prompt": "a dog and a cat"},
        {"tag": "counting", "include": [DOG | {"count": 3}], "exclude": [DOG | {"count": 4}], "prompt": "three dogs"},
        {"tag": "colors", "include": [DOG | {"color": "red"}], "prompt": "a red dog"},
        {"tag": "position", "include": [DOG, cat | {"position": ["left of", 0]}], "prompt": "a cat left of a dog"},
        {"tag": "color_attr", "include": [DOG | {"color": "red"}, cat | {"color": "blue"}], "prompt": "a red dog, a"},
    ]
    path = file(tmp_path, "evaluation_metadata.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    assert read_geneval_metadata(path) == records
    assert read_prompts(path) == [record["prompt"] for record in records]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "line 1: has no prompt"),
        ({"tag": 3}, "'tag' is 3"),
        ({"include": []}, r"'include' is \[\]"),
        ({"include": {"class": "dog"}}, "expected what the image must show"),
        ({"include": ["dog"]}, r"include\[0\] is 'dog'; expected an object"),
        ({"include": [{"count": 1}]}, r"include\[0\] is .*'class' and 'count'"),
        ({"include": [{"class": "dog"}]}, r"include\[0\]: 'count' is None"),
        ({"include": [{"class": "dog", "count": 0}]}, "'count' is 0; it must be a whole number of at least 1"),
        ({"include": [{"class": "dog", "count": True}]}, "'count' is True"),
        ({"include": [DOG | {"color": "mauve"}]}, "'color' is 'mauve'; it must be one of red, orange"),
        ({"include": [DOG, DOG | {"position": ["under", 0]}]}, r"include\[1\]: 'position' is \['under', 0\]"),
        ({"include": [DOG | {"position": ["above", 0]}]}, "index of an earlier object"),
        ({"include": [DOG, DOG | {"position": ["above", 0, 1]}]}, "'position' is"),
        ({"exclude": {"class": "dog"}}, "'exclude' is .*; expected a list"),
        ({"exclude": [{"class": "dog"}]}, r"exclude\[0\]: 'count' is None"),
    ],
)
def test_geneval_refusals(change: dict, message: str, tmp_path: Path) -> None:
    record = {"tag": "counting", "include": [DOG], "prompt": "a photo of a dog"}
    path = file(tmp_path, "m.jsonl", json.dumps(record) + "\n")
    assert read_geneval_metadata(path) == [record]
    with pytest.raises(VarpiError, match=message):
        read_geneval_metadata(file(tmp_path, "m.jsonl", json.dumps(record | change) + "\n"))
    with pytest.raises(VarpiError, match="holds no prompt"):
        read_geneval_metadata(file(tmp_path, "m.jsonl", "\n"))
