"""Many runs under one protocol, on one page: the demo, and the studies that ship with varpi."""

import importlib.resources


def shipped_studies() -> list[str]:
    """Names of the studies inside the package."""
    folder = importlib.resources.files("varpi.studies")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))
