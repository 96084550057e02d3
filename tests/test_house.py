"""The house as CONTRIBUTING.md describes it: imports run down its floors, in no circle, and a word has one meaning."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import varpi

HOUSE = Path(varpi.__file__).parent
FLOORS = (
    {"runtime", "recipe", "errors"},
    {"networks", "generators", "tokenizers", "data", "objective"},
    {"weights", "sampling"},
    {"samples"},
    {"methods", "evaluation"},
    {"training"},
    {"studies", "report", "play"},
    {"cli"},
)
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}
LOOSE = {"__init__", "__main__", "errors", "recipe"}
"""The modules that lie in no room."""
STORES = {"embedded", "recipes"}
"""Folders of data files."""

FAMILIES = {
    "ARCHITECTURES", "Cache", "FAMILY", "PREFIXES", "SIZES", "assemble", "assemble_tokenizer", "config_for",
    "config_from", "facts_of", "shape", "tokenizer_shape",
}  # fmt: skip
INTERFACES = {
    "cli": {"add", "run"},
    "generators": FAMILIES,
    "tokenizers": FAMILIES,
    "methods": {"Settings", "from_recipe"},
}  # fmt: skip
"""Names that several files of a room have because each is one of a kind: a command, a family, a method."""
TWICE = {
    "Outcome",  # of a method's pass over a batch, and of an attempt to read a row; neither file knows of the other
}
"""Names that still have two meanings: none may be added."""
SAME_FILE = {"digits", "images", "tables", "rewards"}
"""Files of one name in several rooms: none may be added."""


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(HOUSE.rglob("*.py")):
        parts = path.relative_to(HOUSE).with_suffix("").parts
        found[".".join(("varpi", *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the house that one imports, at its top or inside a function."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source in MODULES:
                whole = (f"{source}.{alias.name}" for alias in node.names)
                yield from (module if module in MODULES else source for module in whole)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def public_names(path: Path) -> set[str]:
    """Functions, classes and constants that a file defines at its top."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if len(name) > 1 and not name.startswith("_") and name != "logger"}


def test_every_file_lies_in_a_room() -> None:
    assert {room(name) for name in MODULES} == {*HEIGHT, *LOOSE, *STORES}
    assert {path.stem for path in HOUSE.glob("*.py")} == LOOSE
    folders = {path.name for path in HOUSE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == ({*HEIGHT} | STORES) - LOOSE


@pytest.mark.parametrize("lower", sorted(HEIGHT))
def test_imports_run_down(lower: str) -> None:
    inside = [name for name in MODULES if room(name) == lower]
    assert inside
    up = [
        f"{name} imports {other}"
        for name in inside
        for other in imports(name)
        if HEIGHT.get(room(other), 0) > HEIGHT[lower]
    ]
    assert up == []


def test_the_roof_is_only_entered_for_the_version() -> None:
    """`varpi` itself imports everything when asked: a module that asks it for a name would hide where it climbs."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if name != "varpi" and isinstance(node, ast.ImportFrom) and node.module == "varpi" and not node.level:
                asked = {alias.name for alias in node.names if f"varpi.{alias.name}" not in MODULES}
                assert asked <= {"__version__"}, name


def test_imports_run_in_no_circle() -> None:
    graph = {name: {*imports(name)} - {name, "varpi"} for name in MODULES if name != "varpi"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_a_public_name_is_defined_once() -> None:
    homes = defaultdict(list)
    for name, path in MODULES.items():
        for word in public_names(path) - INTERFACES.get(room(name), set()):
            homes[word].append(name)
    for place, words in INTERFACES.items():
        for word in words:
            if word in homes:
                homes[word].append(f"the files of varpi.{place}")
    assert {word: places for word, places in homes.items() if len(places) > 1 and word not in TWICE} == {}
    assert {word for word in TWICE if len(homes[word]) < 2} == set(), "take out what is used once by now"


def test_a_file_name_is_used_once() -> None:
    homes = defaultdict(list)
    for name, path in MODULES.items():
        if room(name) not in {"cli", *STORES} and path.name != "__init__.py":  # a command is called after what it does
            homes[path.stem].append(name)
    assert {stem: places for stem, places in homes.items() if len(places) > 1 and stem not in SAME_FILE} == {}
    assert {stem for stem in SAME_FILE if len(homes[stem]) < 2} == set(), "take out what is used once by now"
