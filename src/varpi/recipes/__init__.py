"""The recipes that ship with varpi."""

import importlib.resources


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = importlib.resources.files("varpi.recipes")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))
