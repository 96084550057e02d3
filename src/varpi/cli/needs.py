"""What a recipe needs that may not be here: weights, extras, data, memory and disk. Nothing is loaded or downloaded."""

import importlib.util
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from varpi.errors import VarpiError
from varpi.recipe import Recipe
from varpi.recipes import shipped_recipes
from varpi.runtime import hub
from varpi.runtime.memory import physical_memory
from varpi.runtime.sources import EMBEDDED, ENDINGS

HOMES = {
    "c2i_": "FoundationVision/LlamaGen",
    "vq_ds16_c2i": "FoundationVision/LlamaGen",
    "vq_ds8_c2i": "FoundationVision/LlamaGen",
    "t2i_": "peizesun/llamagen_t2i",
    "vq_ds16_t2i": "peizesun/llamagen_t2i",
}
"""Repositories of the Hub with LlamaGen's released files, by how their names begin."""
STATE = 16
"""Bytes a trained weight takes: itself, its gradient and AdamW's two moments, in float32."""
KEPT = 12
"""Bytes of it in a checkpoint."""
EMBEDDED_DATA = ("digits", "captioned-digits", "shapes")


class Need(NamedTuple):
    what: str
    there: bool | None
    """None: it is not, and will be downloaded."""
    finding: str


def needs_of(recipe: Recipe) -> list[Need]:
    """What a recipe needs, each with what was found of it."""
    return [*_weights(recipe), *_extras(recipe), *_data(recipe), *_room(recipe)]


def _weights(recipe: Recipe) -> Iterator[Need]:
    for name in ("generator", "tokenizer"):
        section = getattr(recipe, name)
        if section is not None and section.source is not None:
            yield _source(f"{name}.source", section.source)
    encoder = recipe.generator.text_encoder if recipe.generator is not None else None
    if encoder is not None:
        yield _source("generator.text_encoder", encoder)
    reward: Any = getattr(recipe.method, "reward", recipe.method)
    net = str(getattr(reward, "perceptual", ""))
    if net.startswith("lpips") and reward.perceptual_weight > 0:
        from varpi.networks.perceptual import cached_trunk, trunk_url

        kind = net.removeprefix("lpips-")
        named = reward.perceptual_weights
        path = Path(named or cached_trunk(kind))
        what, there = f"weights of {net}", path.is_file()
        get = "this file" if named else "downloaded at first use, or put there"
        finding = str(path) if there else f"not at {path}: {get} ({trunk_url(kind)})"
        yield Need(what, there if named or there else None, finding)


def _source(what: str, source: str) -> Need:
    """Of weights: a file or folder here, embedded, made by another recipe, or on the Hub."""
    path = Path(source).expanduser()
    if source in EMBEDDED:
        return Need(what, True, f"{source}, in the package")
    if path.exists():
        whole = path.is_file() or any(entry.name.endswith((*ENDINGS, ".index.json")) for entry in path.iterdir())
        return Need(what, whole, source if whole else f"{source} holds no checkpoint (*{', *'.join(ENDINGS)})")
    if path.parent == Path("runs") and path.name in shipped_recipes():
        return Need(what, False, f"{source} is made by another recipe: varpi train {path.name}")
    home = next((home for begin, home in HOMES.items() if path.name.startswith(begin)), None)
    if home is not None:
        return Need(what, False, f"{source} is not here: hf download {home} {path.name} --local-dir .")
    match = hub.ID.fullmatch(source)
    if match is None or Path(match["repo"]).suffix in ENDINGS:
        return Need(what, False, f"{source} is not here")
    if hub.is_cached(match["repo"], match["revision"]):
        return Need(what, True, f"{source}, in the Hub's cache")
    return Need(what, None, f"{source} is not in the Hub's cache: downloaded, or by hf download {match['repo']}")


def _is_of_transformers(source: str | None) -> bool:
    """Whether a generator's source is a directory of transformers, here or on the Hub: neither weights nor a run."""
    if source is None or source in EMBEDDED:
        return False
    path = Path(source).expanduser()
    if path.exists():
        return (path / "config.json").is_file()
    match = hub.ID.fullmatch(source)
    return match is not None and not (match["file"] or source).endswith(ENDINGS) and path.parent != Path("runs")


def _extras(recipe: Recipe) -> Iterator[Need]:
    generator = recipe.generator
    rewards = getattr(recipe.method, "rewards", None)
    wanted = {
        ("text", "transformers"): generator is not None
        and (generator.text_encoder is not None or _is_of_transformers(generator.source)),
        ("evaluation", "open_clip"): bool(getattr(rewards, "hps", None) or getattr(rewards, "clip", None)),
        ("lora", "peft"): recipe.lora is not None,
        ("tensorboard", "tensorboard"): recipe.logging.tensorboard,
        ("wandb", "wandb"): recipe.logging.wandb is not None,
    }
    for (extra, module), needed in wanted.items():
        if needed:
            there = importlib.util.find_spec(module) is not None
            yield Need(f"extra {extra}", there, "installed" if there else f"pip install 'varpi[{extra}]'")


def _data(recipe: Recipe) -> Iterator[Need]:
    source = recipe.data.source
    if source in EMBEDDED_DATA:
        yield Need("data.source", True, f"{source}, in the package")
    elif Path(source).expanduser().exists() or any(mark in source for mark in "*{"):
        yield _local_data(recipe)
    elif recipe.data.stream and hub.ID.fullmatch(source):
        yield Need("data.source", True, f"{source}, streamed from the Hub as it comes")
    elif hub.ID.fullmatch(source) and Path(source).parent != Path("data"):  # as shipped recipes call one's own
        finding = f"{source} is not here: downloaded as a dataset of the Hub, or --set data.source=YOURS"
        yield Need("data.source", None, finding)
    else:
        yield Need("data.source", False, f"{source} is not here: --set data.source=YOURS")
    if recipe.data.caption_features is not None:
        there = Path(recipe.data.caption_features).is_dir()
        made = f"varpi encode captions {source} --output {recipe.data.caption_features}"
        yield Need("data.caption_features", there, recipe.data.caption_features if there else f"made by: {made}")


def _local_data(recipe: Recipe) -> Need:
    """Of data that are here: whether they have the splits, and of class folders whether these hold images."""
    from varpi.data.folder import check_tree
    from varpi.data.source import locate

    source, splits = recipe.data.source, [recipe.data.split]
    if recipe.validation is not None:
        splits.append(recipe.validation.split)
    try:
        for split in splits:
            place = locate(source, split)
            if place.kind == "folders":
                check_tree(place.paths[0], split)
    except VarpiError as error:
        return Need("data.source", False, str(error))
    return Need("data.source", True, source)


def _room(recipe: Recipe) -> Iterator[Need]:
    """Memory and disk, where the number of trained weights is told by an architecture or a file."""
    count = _trained(recipe)
    if count is None or recipe.lora is not None:
        return
    average = 4 if recipe.training.ema is not None else 0
    needed, (there, where) = count * (STATE + average), _memory()
    finding = f"{_gib(needed)} for {count / 1e6:.0f} million weights with gradient and optimizer, besides activations"
    if there is not None:
        yield Need("memory", needed < there, f"{finding}; {where} {_gib(there)}")
    disk = count * ((KEPT + average) * (recipe.training.keep + 1) + 4)
    free = shutil.disk_usage(".").free
    yield Need("disk", disk < free, f"{_gib(disk)} for checkpoints and the model; here are {_gib(free)} free")


def _trained(recipe: Recipe) -> int | None:
    name = "tokenizer" if recipe.method.trains == "tokenizer" or recipe.generator is None else "generator"
    section = getattr(recipe, name)
    if section is None:
        return None
    if name == "generator" and isinstance(section.architecture, str) and section.architecture.startswith("llamagen"):
        import torch

        from varpi.generators import LlamaGen
        from varpi.generators.llamagen_files import config_for

        with torch.device("meta"):
            return sum(p.numel() for p in LlamaGen(config_for(section.architecture)).parameters())
    if section.source in EMBEDDED:
        from safetensors import safe_open

        from varpi.runtime.sources import embedded

        with safe_open(embedded(section.source, name), framework="pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return None


def _memory() -> tuple[int | None, str]:
    import torch

    if not torch.cuda.is_available():
        return physical_memory(), "this machine has"
    cards = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return sum(cards), f"the {len(cards)} cards have" if len(cards) > 1 else "the card has"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2g} GiB" if size < 10 * 2**30 else f"{size / 2**30:.0f} GiB"
