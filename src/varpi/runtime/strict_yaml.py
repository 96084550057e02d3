"""YAML as recipes use it: nested keys and values, each written once, of a size that a person could have written.

Left out of YAML: aliases (a few of them can stand for 10^12 values), keys that are not text, and a key given twice,
of which the first would be lost in silence.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from varpi.errors import VarpiError

DEEPEST = 32
"""Levels of nesting."""
MOST = 10_000
"""Keys and values in one document."""


def check_extent(values: Any) -> None:
    """Refuse nested dictionaries and lists, from wherever they come, that no document read here could be.

    Raises VarpiError: too deep or too many (so also what contains itself), a key that is not text, a whole number of
    more than 64 bits.
    """
    count, rest = 0, [("", values, 0)]
    while rest:
        path, value, depth = rest.pop()
        count += 1
        if depth > DEEPEST:
            raise VarpiError(f"{path:.40}…: nested deeper than {DEEPEST} levels")
        if count > MOST:
            raise VarpiError(f"more than {MOST} keys and values")
        if isinstance(value, int) and value.bit_length() > 64:
            raise VarpiError(f"{path} is a number of {value.bit_length()} bits; whole numbers have at most 64")
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise VarpiError(f"{path and f'{path}: '}the key {key!r:.40} is no text, as a key must be")
                rest.append((f"{path}.{key}" if path else key, item, depth + 1))
        elif isinstance(value, list | tuple | set):
            rest.extend((f"{path}.{i}", item, depth + 1) for i, item in enumerate(value))


def parse_yaml(text: str | bytes) -> Any:
    """The value that one YAML document writes out; raises VarpiError with the reason, in a line, and nothing else."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        reason = " ".join(str(part) for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise VarpiError(f"{where}{reason}") from None
    except yaml.YAMLError as error:
        raise VarpiError(" ".join(str(error).split())) from None


class _Loader(yaml.SafeLoader):
    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refusal(f"*{event.anchor} is an alias; write the value out", event)
        if self.depth == DEEPEST:
            raise _refusal(f"nested deeper than {DEEPEST} levels", event)
        self.count += 1
        if self.count > MOST:
            raise _refusal(f"more than {MOST} keys and values", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag != "tag:yaml.org,2002:str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a key"
                raise _refusal(f"{shown:.40} is no text, as a key must be; write it in quotes", key)
            if key.value in lines:
                raise _refusal(f"the key {key.value:.40} is given twice, in line {lines[key.value]} too", key)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # what a constructor of Python raises for 2024-99-99 or a number of 5000 digits
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise _refusal(f"{str(node.value)[:40]!r} looks like a value of kind {kind}, but is none", node) from error


def _refusal(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def with_comments(text: str, source: str) -> str:
    """`text` with the comments of `source` on keys that both have with the same value, and those that it begins with.

    Both are YAML documents that `parse_yaml` reads.
    """
    theirs = {path: (value, comment) for path, value, _, comment in _pairs(source) if comment}
    lines = text.splitlines()
    for path, value, line, _ in _pairs(text):
        if line is not None and path in theirs and theirs[path][0] == value:
            lines[line] += f"  {theirs[path][1]}"
    whole = source.splitlines()
    head = whole[: next((i for i, line in enumerate(whole) if not line.startswith("#")), len(whole))]
    return "".join(f"{line}\n" for line in [*head, *lines])


def _pairs(text: str) -> Iterator[tuple[tuple[str, ...], Any, int | None, str]]:
    """Of every key: its path, its value (none, if that is a mapping), the line that it shares with no part of another
    key's value, and the comment there."""
    lines, loader = text.splitlines(), _Loader(text)
    rest: list[tuple[tuple[str, ...], Any]] = [((), loader.get_single_node())]
    while rest:
        path, node = rest.pop()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            inner, line = (*path, key.value), key.start_mark.line
            nested = isinstance(value, yaml.CollectionNode) and not value.flow_style
            block = isinstance(value, yaml.ScalarNode) and value.style in ("|", ">")
            whole = value.end_mark.line == line
            end = value.end_mark.column if whole and not nested else key.end_mark.column
            comment = "" if not (whole or nested or block) else lines[line][end:].partition(" #")[2]
            mapping = isinstance(value, yaml.MappingNode)
            plain = None if mapping else loader.construct_object(value, deep=True)
            yield inner, plain, line if whole or nested else None, f"# {comment.strip()}" if comment else ""
            rest.append((inner, value))
