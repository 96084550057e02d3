"""`varpi train`: carry out a recipe."""

import argparse
import os
from pathlib import Path
from typing import Any

from varpi.cli.options import add_device, command, say
from varpi.errors import VarpiError
from varpi.recipes import shipped_recipes


def add(commands: Any) -> None:
    parser = command(
        commands,
        "train",
        run,
        "carry out a recipe",
        "Carry out a recipe: a YAML file, or one that ships with varpi:\n"
        f"  {', '.join(shipped_recipes())}\n"
        "(`varpi recipes` has a sentence on each).\n\n"
        "Under torchrun the model is sharded over all processes:\n"
        "  torchrun --nproc-per-node 8 -m varpi train llamagen-c2i-xxl --set data.source=data/imagenet",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    parser.add_argument("--output", help="run directory (default: runs/ and the recipe's name)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="change a value of the recipe, for instance --set optimizer.learning_rate=2e-6 or --set validation=null; "
        "may be repeated",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in the run directory"
    )
    add_device(parser)
    parser.add_argument(
        "--print-recipe", action="store_true", help="print the complete recipe, with its comments, and stop"
    )

    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what memory and time the recipe takes on this device, refuse what does not fit, and stop; needs the "
        "sizes of the models, not their weights: generator.architecture is enough",
    )
    parser.add_argument(
        "--device-memory", type=_gib, metavar="GIB", help="with --dry-run: reckon for a card of so much memory"
    )


def run(options: argparse.Namespace) -> None:
    from varpi.recipe import find_recipe, load_recipe
    from varpi.runtime.strict_yaml import with_comments

    recipe = load_recipe(options.recipe, options.settings)
    if options.print_recipe:
        print(with_comments(recipe.to_yaml(), find_recipe(options.recipe).read_text(encoding="utf-8")), end="")
        return
    if options.device_memory is not None and not options.dry_run:
        raise VarpiError("--device-memory is for --dry-run; leave it out")
    if options.dry_run:
        from varpi.training.dry_run import dry_run

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise VarpiError("--dry-run reckons for one process; run it without torchrun")
        print("\n".join(dry_run(recipe, options.device, options.device_memory)))
        return
    for section in (recipe.generator, recipe.tokenizer):
        if section is not None and section.source is not None:
            _check_base(Path(section.source))
    from varpi.report.live import write_live
    from varpi.training import train

    run = train(
        recipe,
        options.output or Path("runs", Path(options.recipe).stem),
        resume=options.resume,
        device=options.device,
        watch=write_live,
    )
    if os.environ.get("RANK", "0") == "0" and (run / "model.safetensors").is_file():
        say(f"wrote {run / 'model.safetensors'}")


def _gib(text: str) -> float:
    size = float(text)
    if not 0 < size < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a size of memory in GiB")
    return size


def _check_base(source: Path) -> None:
    """Where a recipe begins with what another one makes, say so when that has not been run, or not to its end."""
    if (
        source.parent != Path("runs")
        or source.name not in shipped_recipes()
        or (source / "model.safetensors").is_file()
    ):
        return
    if source.is_dir():
        raise VarpiError(f"{source} has not been trained to its end: run `varpi train {source.name} --resume` first")
    raise VarpiError(f"{source} is not there: it is made by another recipe; run `varpi train {source.name}` first")
