"""What the playground plays with: one pair or two, and the reward by which VA-π would judge their samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from varpi.data.classes import readable
from varpi.errors import VarpiError
from varpi.methods.rewards import load_reward_network
from varpi.methods.va_pi import Settings
from varpi.objective.rewards import Perceptual
from varpi.recipe import Recipe, load_recipe
from varpi.runtime.sources import EMBEDDED, Source
from varpi.weights.pair import Pair, open_generator, open_tokenizer, recipe_of

EMBEDDED_CLASSES = {
    "digits": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
"""What the embedded generators' classes are, whose files hold no names."""


@dataclass(frozen=True)
class Player:
    """A pair, in eval mode, and what it is called on the page."""

    name: str
    pair: Pair


@dataclass(frozen=True)
class Playground:
    """Everything that the page needs of models. Raises VarpiError for two pairs that do not draw the same thing."""

    players: tuple[Player, ...]
    """The one that is compared with, if there is one, and last the one that was asked for."""
    settings: Settings
    """VA-π's, of the run or of the recipe that belongs to the pair."""
    perceptual: Perceptual | None
    """The network of the reward; none where its weight is 0."""
    about_reward: str
    """Whose settings these are and what was left out, in a sentence."""
    class_names: tuple[str, ...] | None
    """Of all classes by id, as far as they are known."""

    def __post_init__(self) -> None:
        facts = [_facts(player.pair) for player in self.players]
        for what, value in facts[0].items():
            if facts[-1][what] != value:
                raise VarpiError(
                    f"{self.players[0].name} and {self.players[-1].name} cannot stand side by side: their {what} are "
                    f"{value} and {facts[-1][what]}"
                )
        for player in self.players:
            generator = player.pair.generator
            if generator.caption_features is not None and generator.text_encoder is None:
                raise VarpiError(
                    f"{player.name}: this generator reads caption features; name what makes them of a prompt "
                    "(--text-encoder): a T5 directory or Hub id"
                )

    @property
    def pair(self) -> Pair:
        """The one that was asked for."""
        return self.players[-1].pair

    def classes(self) -> list[tuple[str, int]]:
        """What each class is called, and its id; none where it is prompts that are understood."""
        count = self.pair.generator.num_classes or 0
        names = readable(self.class_names or ())
        names += [f"class {i}" for i in range(len(names), count)]
        return [(name if name == str(i) else f"{i} · {name}", i) for i, name in enumerate(names[:count])]


def _facts(pair: Pair) -> dict[str, Any]:
    """What two pairs must share for one seed to ask the same of both."""
    generator = pair.generator
    return {
        "grids of tokens": f"{generator.grid}x{generator.grid}",
        "image sizes": pair.image_size,
        "conditions": "prompts" if generator.num_classes is None else f"{generator.num_classes} classes",
    }


def open_playground(
    source: str,
    open_named: Callable[[str, Source | None], Pair],
    *,
    compare: str | None = None,
    alone: bool = False,
    class_names: tuple[str, ...] | None = None,
    perceptual_weights: str | None = None,
    device: str = "cpu",
) -> Playground:
    """Load all that the page needs.

    source: of the pair; see `open_pair`.
    open_named: opens a pair by its source, with whatever else was said of tokenizers, sizes and encoders; the second
        argument is the tokenizer's source where neither that nor the pair itself says it.
    compare: another pair; by default what a run started from, unless `alone`.
    class_names: by id, in place of those that are stored with the pair.
    perceptual_weights: file with the weights of the reward's LPIPS trunk, in place of the recipe's.

    Nothing is downloaded for the reward: LPIPS is left out, and the page says so, when its weights are not here.
    """
    pair, recipe = open_named(source, None), recipe_of(source)
    players = [Player(source, pair)]
    if compare is not None:
        own = compare in EMBEDDED or recipe_of(compare) is not None
        tokenizer = None if own or recipe is None or recipe.tokenizer is None else recipe.tokenizer.source
        players.insert(0, Player(compare, open_named(compare, tokenizer)))
    elif not alone and recipe is not None and (before := _before(recipe, pair, device)) is not None:
        players.insert(0, before)
    for player in players:  # of one family, but only one was told of an encoder
        generator = player.pair.generator
        if generator.text_encoder is None and generator.caption_features == pair.generator.caption_features:
            generator.text_encoder = pair.generator.text_encoder
    start = recipe.generator.source if recipe is not None and recipe.generator is not None else source
    settings, whose = _settings(recipe, start)
    settings, left_out = _at_hand(settings, perceptual_weights)
    return Playground(
        tuple(players),
        settings,
        load_reward_network(settings.reward, device),
        " ".join(filter(None, [whose, left_out])),
        class_names or pair.class_names or EMBEDDED_CLASSES.get(start or ""),
    )


def _before(recipe: Recipe, pair: Pair, device: str) -> Player | None:
    """What a run started from; None where it started from fresh weights."""
    if recipe.generator is None or recipe.tokenizer is None or recipe.generator.source is None:
        return None
    if recipe.method.trains == "tokenizer":
        if recipe.tokenizer.source is None:
            return None
        before = Pair(pair.generator, open_tokenizer(recipe.tokenizer, device).eval())
    else:
        before = Pair(open_generator(recipe, device).eval(), pair.tokenizer)
    return Player(f"{recipe.generator.source}, before", before)


def _settings(recipe: Recipe | None, start: str | None) -> tuple[Settings, str]:
    """The settings of VA-π to show its step by, and whose they are. start: what the pair started from."""
    if recipe is not None and isinstance(recipe.method, Settings):
        return recipe.method, "The reward and its settings are the run's."
    if start in EMBEDDED:
        settings = load_recipe(start).method
        assert isinstance(settings, Settings)
        return settings, f"The reward and its settings are those of the recipe {start}."
    return Settings(name="va_pi"), "The reward and its settings are VA-π's defaults."


def _at_hand(settings: Settings, weights: str | None) -> tuple[Settings, str]:
    """The settings with the reward that can be computed here, and what was left out of it."""
    reward = settings.reward
    if reward.perceptual_weight == 0 or not reward.perceptual.startswith("lpips"):
        if weights is not None:
            raise VarpiError("--perceptual-weights is given, but the reward here has no LPIPS")
        return settings, ""
    if weights is not None:
        reward = reward.model_copy(update={"perceptual_weights": weights})
    elif reward.perceptual_weights is None:
        from varpi.networks.perceptual import cached_trunk  # brings torchvision

        if not (file := cached_trunk(reward.perceptual.removeprefix("lpips-"))).is_file():
            mse = reward.mse_weight if reward.mse_weight + reward.l1_weight > 0 else 1.0
            reward = reward.model_copy(update={"perceptual_weight": 0.0, "mse_weight": mse})
            left_out = f"LPIPS is left out: its weights, {file.name}, are not here (--perceptual-weights names them)."
            return settings.model_copy(update={"reward": reward}), left_out
    return settings.model_copy(update={"reward": reward}), ""
