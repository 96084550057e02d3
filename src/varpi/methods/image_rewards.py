"""Rewards of an image and of what it was asked to be: networks, a user's function, a server. `RewardTerms` lists them.

A reward takes images uint8 (B,3,H,W) and what they were asked to be, class ids int64 (B,) or B captions, all on the
CPU, and gives B finite numbers; larger is better. None may be the network that evaluates afterwards.
"""

import base64
import importlib
import io
import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.client import HTTPException
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from varpi.errors import VarpiError
from varpi.generators import Generator
from varpi.networks.clip import CLIP_B32, ClipScorer
from varpi.networks.convnet import SmallConvNet, load_classifier
from varpi.networks.hps import HpsScorer
from varpi.networks.judges import JUDGES, load_judge
from varpi.recipe import Float, Int, Section, Weight
from varpi.runtime.files import line
from varpi.runtime.sources import embedded

Asked = Tensor | list[str]
ImageReward = Callable[[Tensor, Asked], Any]
LARGEST_ANSWER = 2**24
"""Bytes of a server's answer."""


class RewardFailed(VarpiError):
    """A reward raised, did not answer, or gave something else than a finite number for each image."""


# -- settings


def _dotted(path: str) -> str:
    if not re.fullmatch(r"[\w.]+:[\w.]+", path):
        raise ValueError("must be package.module:name")
    return path


def _web(url: str) -> str:
    if not re.match(r"https?://.", url):
        raise ValueError("must be an address of http:// or https://")
    return url


class RewardTerm(Section):
    weight: Weight = 1.0
    """What the reward is multiplied by; 0 leaves it out, unloaded."""


class ClipReward(RewardTerm):
    """The cosine of image and prompt in CLIP's embedding; AR-GRPO's weight is 5."""

    source: str = CLIP_B32
    """A directory in transformers' layout or a Hub id."""


class HpsReward(RewardTerm):
    """The human preference score (arXiv 2306.09341); AR-GRPO's weight is 5."""

    version: Literal["v2.1", "v2.0"] = "v2.1"
    weights: str | None = None
    """The checkpoint, a file or Hub id; none: xswu/HPSv2's."""


class ClassifierReward(RewardTerm):
    """The log-probability of the class that was asked for, in nats."""

    weights: str
    """A classifier that the method `classifier` trained, or `digits`: the embedded one that is not the judge."""


class FunctionReward(RewardTerm):
    """A function of yours, called with the images and what was asked."""

    path: Annotated[str, AfterValidator(_dotted)]
    """package.module:name; the module must be importable where `varpi` runs (PYTHONPATH)."""


class HttpReward(RewardTerm):
    """A server that answers POST {"images": [PNG in base64, …], "asked": [class id or caption, …]} with
    {"rewards": [number, …]}."""

    url: Annotated[str, AfterValidator(_web)]
    timeout: Annotated[Float, Field(gt=0)] = 60.0
    """Seconds to wait for it."""
    tries: Annotated[Int, Field(ge=1, le=10)] = 3
    """How often it is asked, with 1, 2, 4, … seconds between, before the run stops."""


class RewardTerms(Section):
    """The reward is their weighted sum."""

    clip: ClipReward | None = None
    hps: HpsReward | None = None
    classifier: ClassifierReward | None = None
    function: FunctionReward | None = None
    http: HttpReward | None = None

    @model_validator(mode="after")
    def _some_term(self) -> Self:
        if not self.active:
            raise ValueError(f"no reward has a weight; there are {', '.join(type(self).model_fields)}")
        return self

    @property
    def active(self) -> dict[str, Any]:
        """The terms of positive weight, by name."""
        return {name: term for name in type(self).model_fields if (term := getattr(self, name)) and term.weight > 0}


# -- what they become


class ImageRewards:
    """The active terms, loaded. Raises VarpiError for what cannot be loaded, or cannot score the generator's images."""

    def __init__(self, terms: RewardTerms, generator: Generator, device: str) -> None:
        self._weights = {name: term.weight for name, term in terms.active.items()}
        self._scorers = {name: _load(term, generator, device) for name, term in terms.active.items()}

    def __call__(self, images: Tensor, asked: Asked) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum float32 (B,), and each reward itself by name. Raises RewardFailed."""
        parts = {name: _checked(name, scorer, images, asked) for name, scorer in self._scorers.items()}
        return sum((self._weights[name] * part for name, part in parts.items()), torch.zeros(len(images))), parts


def _checked(name: str, scorer: ImageReward, images: Tensor, asked: Asked) -> Tensor:
    where, count = f"method.rewards.{name}", len(images)
    try:
        values = scorer(images, asked)
    except VarpiError as error:
        raise RewardFailed(f"{where}: {error}") from error
    except Exception as error:  # it may be anyone's code
        raise RewardFailed(f"{where}: raised {line(error)}") from error
    try:
        rewards = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardFailed(f"{where}: gave {type(values).__name__}, not {count} numbers ({line(error)})") from error
    if rewards.shape != (count,):
        raise RewardFailed(f"{where}: gave shape {tuple(rewards.shape)} for {count} images; it must be ({count},)")
    if bad := int((~rewards.isfinite()).sum()):
        raise RewardFailed(f"{where}: {bad} of {count} rewards are not finite")
    return rewards


def _load(term: RewardTerm, generator: Generator, device: str) -> ImageReward:
    match term:
        case ClipReward():
            return _of_prompts(ClipScorer(term.source, device=device), generator)
        case HpsReward():
            return _of_prompts(HpsScorer(term.weights, version=term.version, device=device), generator)
        case ClassifierReward():
            return _classifier(term.weights, generator, device)
        case FunctionReward():
            return _function(term.path)
        case HttpReward():
            return lambda images, asked: _ask(term, images, asked)
    raise AssertionError(term)


def _of_prompts(scorer: Callable[[Tensor, Sequence[str]], Tensor], generator: Generator) -> ImageReward:
    """Class ids become "a photo of" their names, as in AR-GRPO."""

    def score(images: Tensor, asked: Asked) -> Tensor:
        if not isinstance(asked, Tensor):
            return scorer(images, asked)
        names = generator.class_names
        if names is None:
            raise VarpiError("the names of the classes are not known, and it reads prompts; give them in data.classes")
        return scorer(images, [f"a photo of {names[number]}" for number in asked.tolist()])

    return score


def _classifier(weights: str, generator: Generator, device: str) -> ImageReward:
    network = load_classifier(embedded("digits", "perceptual") if weights == "digits" else weights, device)
    if generator.num_classes is None:
        raise VarpiError("method.rewards.classifier scores classes; this generator is conditioned on text")
    if network.num_classes < generator.num_classes:
        raise VarpiError(
            f"method.rewards.classifier.weights: {weights} knows {network.num_classes} classes, the generator "
            f"{generator.num_classes}"
        )
    if any(_same(network, judge) for judge in _judges(device)):
        raise VarpiError(
            f"method.rewards.classifier.weights: {weights} is an embedded judge, which evaluates and must not reward; "
            "give another network"
        )

    @torch.no_grad()
    def score(images: Tensor, asked: Asked) -> Tensor:
        assert isinstance(asked, Tensor)
        logits = network.logits(images.to(device).float() / 127.5 - 1)
        return logits.log_softmax(dim=1).gather(1, asked.to(device)[:, None])[:, 0]

    return score


def _judges(device: str) -> Iterator[SmallConvNet]:
    """Those that are in this package."""
    for name in JUDGES:
        with suppress(VarpiError):
            yield load_judge(name, device)


def _same(network: SmallConvNet, other: SmallConvNet) -> bool:
    one, two = network.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _function(path: str) -> ImageReward:
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the user's code
        raise VarpiError(
            f"method.rewards.function.path: {path} cannot be imported ({line(error)}); is its folder on PYTHONPATH?"
        ) from error
    if not callable(found):
        raise VarpiError(f"method.rewards.function.path: {path} is a {type(found).__name__}, not a function")
    return found


def _ask(term: HttpReward, images: Tensor, asked: Asked) -> Any:
    """The answer of the server, asked again when there is none."""
    asked = asked.tolist() if isinstance(asked, Tensor) else asked
    body = {"images": [_png(image) for image in images], "asked": asked}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(term.url, json.dumps(body).encode(), headers, method="POST")
    problem: Exception | None = None
    for attempt in range(term.tries):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=term.timeout) as answer:
                return json.loads(answer.read(LARGEST_ANSWER))["rewards"]
        except (OSError, HTTPException, ValueError, KeyError, TypeError, RecursionError) as error:
            problem = error
    assert problem is not None
    raise VarpiError(f"{term.url} gave no rewards, asked {term.tries} times; the last was {line(problem)}")


def _png(image: Tensor) -> str:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
