"""`varpi recipes`: what ships, what a recipe can say, and a schema for editors."""

import argparse
import json
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from varpi.cli.options import command
from varpi.errors import VarpiError
from varpi.recipes import shipped_recipes


def add(commands: Any) -> None:
    parser = command(
        commands,
        "recipes",
        run,
        "list the recipes that ship, explain their keys",
        "Without options: the recipes that ship with varpi, a sentence each.\n\n"
        "  varpi recipes digits > mine.yaml                  a recipe of your own begins as a copy of another\n"
        "  varpi recipes --keys va_pi                        what it may say\n"
        "  varpi recipes --schema > varpi-recipe.json        for an editor: # yaml-language-server: $schema=FILE",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="print this one as it was written, with comments")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--keys", metavar="METHOD", help="print every key of a recipe for this method, and its meaning")
    what.add_argument("--schema", action="store_true", help="print the JSON schema of recipes")


def run(options: argparse.Namespace) -> None:
    if options.recipe is not None and (options.keys or options.schema):
        raise VarpiError("a recipe's name stands alone: leave out --keys and --schema")
    if options.keys:
        print("\n".join(keys_of(options.keys)))
    elif options.schema:
        print(json.dumps(schema(), indent=1, ensure_ascii=False))
    elif options.recipe is not None:
        if options.recipe not in shipped_recipes():
            raise VarpiError(f"no recipe {options.recipe!r} ships; there are {', '.join(shipped_recipes())}")
        print(_text(options.recipe), end="")
    else:
        width = max(map(len, shipped_recipes()))
        for name in shipped_recipes():
            print(f"{name:{width}}  {_sentence(_text(name))}")


def keys_of(method: str) -> list[str]:
    """A line for each key of a recipe for this method: its path, type, default and meaning."""
    from varpi.recipe import Recipe, method_names, method_settings

    settings = method_settings(method)
    if settings is None:
        raise VarpiError(f"no method {method!r}; there are {', '.join(method_names())}")
    lines = [*_keys("method", settings)]
    for name, field in Recipe.model_fields.items():
        if name == "method" or (name in ("generator", "tokenizer") and name not in settings.needs):
            continue
        section = _section(field.annotation)
        if section is None:
            lines.append(_key(name, field))
            continue
        if type(None) in get_args(field.annotation) and name not in settings.needs:
            lines.append(f"{name}: section, absent unless one of its keys is given")
        lines += _keys(name, section)
    return lines


def schema() -> dict[str, Any]:
    """The JSON schema (2020-12) of recipes, for editors; what one key asks of another only varpi itself checks."""
    from varpi.recipe import Recipe, method_names, method_settings

    whole = Recipe.model_json_schema()
    definitions = whole["$defs"]
    del definitions["MethodSection"]
    for name in method_names():
        settings = method_settings(name)
        assert settings is not None
        one = settings.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        definitions |= {f"{name}.{part}": text for part, text in one.pop("$defs", {}).items()}
        one["properties"]["name"] = {"const": name}
        one["required"] = sorted({*one.get("required", []), "name"})
        definitions[name] = one
    whole["properties"]["method"] = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in method_names()]}
    return _standard({"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "title": "A recipe of varpi"})


def _standard(node: Any) -> Any:
    """Bounds under JSON schema's own names: pydantic leaves those that stand behind a validator as they are."""
    names = {"ge": "minimum", "le": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
    if isinstance(node, list):
        return [_standard(one) for one in node]
    if not isinstance(node, dict):
        return node
    bounds = "type" in node and not isinstance(node["type"], dict)  # not the properties of a section
    return {names.get(name, name) if bounds else name: _standard(value) for name, value in node.items()}


def _text(name: str) -> str:
    from varpi.recipe import find_recipe

    return find_recipe(name).read_text(encoding="utf-8")


def _sentence(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    head = []
    for line in text.splitlines():
        if not line.startswith("#") or line == "#":
            break
        head.append(line[1:].strip())
    sentence = " ".join(head).split(". ")[0].removesuffix(".")
    return sentence if len(sentence) <= 115 else sentence.split(": ")[0]


def _keys(path: str, section: Any) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is None:
            yield _key(f"{path}.{name}", field)
        else:
            yield from _keys(f"{path}.{name}", inner)


def _key(path: str, field: Any) -> str:
    said = " ".join((field.description or "").split())
    if field.is_required():
        default = "required"
    elif field.default_factory is not None:
        default = f"default {field.default_factory()!r}"
    else:
        default = f"default {'none' if field.default is None else json.dumps(field.default, ensure_ascii=False)}"
    kind = _type(field.annotation)
    if type(None) in get_args(field.annotation) and field.default is not None:
        kind += " | null"
    return f"{path}: {kind}, {default}" + (f". {said}" if said else "")


def _section(annotation: Any) -> Any:
    """The section that an annotation is, or may be."""
    from varpi.recipe import Section

    members = get_args(annotation) if get_origin(annotation) in (types.UnionType, Union) else (annotation,)
    return next((one for one in members if isinstance(one, type) and issubclass(one, Section)), None)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "none"
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (types.UnionType, Union):
        return " | ".join(_type(one) for one in arguments if one is not type(None))
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    names = {int: "whole number", float: "number", str: "text", bool: "true | false", Any: "anything"}
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
