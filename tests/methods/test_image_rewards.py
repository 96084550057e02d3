"""Rewards from outside: what they give, what they are refused, and a server that may not answer."""

import base64
import io
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from varpi.errors import VarpiError
from varpi.methods.image_rewards import ImageRewards, RewardFailed, RewardTerms
from varpi.networks.convnet import load_classifier, save_classifier
from varpi.networks.judges import load_judge
from varpi.runtime.sources import embedded

IMAGES = torch.arange(3 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(3, 3, 32, 32)
ASKED = torch.tensor([2, 0, 1])


def rewards(generator: Any = None, **terms: Any) -> ImageRewards:
    return ImageRewards(RewardTerms.model_validate(terms), tiny.generator() if generator is None else generator, "cpu")


def function(name: str, weight: float = 1.0) -> dict[str, Any]:
    return {"path": f"test_image_rewards:{name}", "weight": weight}


# -- functions of a user


def first_pixel(images: Tensor, asked: Tensor) -> list[float]:
    return [float(image[0, 0, 0]) + float(number) for image, number in zip(images, asked, strict=True)]


def as_array(images: Tensor, asked: Tensor) -> np.ndarray:
    return images.double().numpy().mean(axis=(1, 2, 3))


def one_short(images: Tensor, asked: Tensor) -> Tensor:
    return torch.zeros(len(images) - 1)


def with_a_nan(images: Tensor, asked: Tensor) -> list[float]:
    return [0.0, math.nan, math.inf]


def words(images: Tensor, asked: Tensor) -> list[str]:
    return ["good"] * len(images)


def failing(images: Tensor, asked: Tensor) -> Tensor:
    raise KeyError("weights")


not_a_function = 3


def test_the_sum_of_weighted_rewards() -> None:
    score = rewards(
        classifier={"weights": "digits", "weight": 0.5},
        function=function("first_pixel", 2.0),
        http={"url": "http://x", "weight": 0},
    )
    total, parts = score(IMAGES, ASKED)
    assert set(parts) == {"classifier", "function"}  # what has no weight is not asked
    expected = [float(IMAGES[i, 0, 0, 0]) + float(ASKED[i]) for i in range(3)]
    assert parts["function"].tolist() == expected
    torch.testing.assert_close(total, 2 * parts["function"] + 0.5 * parts["classifier"])
    network = load_classifier(embedded("digits", "perceptual"))
    probabilities = network.logits(IMAGES.float() / 127.5 - 1).softmax(1)
    torch.testing.assert_close(parts["classifier"], torch.stack([probabilities[i, ASKED[i]] for i in range(3)]).log())


def test_arrays_will_do() -> None:
    total, _ = rewards(function=function("as_array"))(IMAGES, ASKED)
    torch.testing.assert_close(total, IMAGES.float().mean((1, 2, 3)))
    assert total.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one_short", r"gave shape \(2,\) for 3 images; it must be \(3,\)"),
        ("with_a_nan", "2 of 3 rewards are not finite"),
        ("words", r"gave list, not 3 numbers \(.+\)"),
        ("failing", "raised KeyError: 'weights'"),
    ],
)
def test_what_is_no_reward(name: str, said: str) -> None:
    with pytest.raises(RewardFailed, match=rf"^method\.rewards\.function: {said}$"):
        rewards(function=function(name))(IMAGES, ASKED)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_module:score", r"cannot be imported \(ModuleNotFoundError: No module named .*\); is its folder on"),
        ("test_image_rewards:absent", r"cannot be imported \(AttributeError: module .* has no attribute 'absent'\)"),
        ("test_image_rewards:not_a_function", "is a int, not a function"),
    ],
)
def test_a_function_that_is_not_there(path: str, said: str) -> None:
    with pytest.raises(VarpiError, match=rf"^method\.rewards\.function\.path: {path} {said}"):
        rewards(function={"path": path})


# -- networks


def test_a_judge_does_not_reward(tmp_path: Path) -> None:
    """Not even from another file."""
    judge = load_judge()
    save_classifier(judge, tmp_path / "mine.safetensors", judge.state_dict(), {"recipe": "another"})
    with pytest.raises(VarpiError, match=r"mine\.safetensors is an embedded judge, which evaluates and must not rewa"):
        rewards(classifier={"weights": str(tmp_path / "mine.safetensors")})


def test_a_classifier_must_know_the_classes() -> None:
    generator = tiny.generator()
    generator.num_classes = 11
    with pytest.raises(VarpiError, match="digits knows 10 classes, the generator 11"):
        rewards(generator, classifier={"weights": "digits"})
    generator.num_classes = None
    with pytest.raises(VarpiError, match=r"method\.rewards\.classifier scores classes; this generator is condit"):
        rewards(generator, classifier={"weights": "digits"})


@pytest.mark.parametrize("name", ["clip", "hps"])
def test_networks_of_prompts_read_captions_or_the_names_of_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Scorer:
        def __init__(self, source: Any, **settings: Any) -> None:
            made.append((source, settings))

        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            assert images.dtype == torch.uint8
            seen.append(prompts)
            return torch.tensor([len(prompt) for prompt in prompts])

    made: list[Any] = []
    seen: list[list[str]] = []
    monkeypatch.setattr("varpi.methods.image_rewards.ClipScorer", Scorer)
    monkeypatch.setattr("varpi.methods.image_rewards.HpsScorer", Scorer)
    generator = tiny.generator()
    settings = {"source": "here"} if name == "clip" else {"weights": "here", "version": "v2.0"}
    score = rewards(generator, **{name: {**settings, "weight": 5}})
    ((source, given),) = made
    assert source == "here"
    assert given == ({"device": "cpu"} if name == "clip" else {"device": "cpu", "version": "v2.0"})
    total, _ = score(IMAGES, ["a", "bc", "def"])
    assert total.tolist() == [5, 10, 15]
    with pytest.raises(RewardFailed, match=r"the names of the classes are not known, .*; give them in data\.classes"):
        score(IMAGES, ASKED)
    generator.class_names = ("ant", "bee", "cat")
    score(IMAGES, ASKED)
    assert seen[-1] == ["a photo of cat", "a photo of ant", "a photo of bee"]


# -- a server


class Server(HTTPServer):
    """Answers with the next of `answers`: JSON, or a status of failure; keeps what it was asked."""

    answers: list[Any]
    bodies: list[dict[str, Any]]

    class Handler(BaseHTTPRequestHandler):
        server: "Server"

        def do_POST(self) -> None:
            self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = self.server.answers.pop(0)
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(b"" if isinstance(answer, int) else json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Server.Handler)
    server.answers, server.bodies = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr("varpi.methods.image_rewards.time.sleep", seconds.append)
    return seconds


def asking(server: Server, **settings: Any) -> ImageRewards:
    return rewards(http={"url": f"http://127.0.0.1:{server.server_port}/score", **settings})


def test_a_server_gets_pictures_and_what_was_asked(server: Server) -> None:
    server.answers = [{"rewards": [0.5, 1, -2]}, {"rewards": [1, 2, 3]}]
    total, _ = asking(server)(IMAGES, ASKED)
    assert total.tolist() == [0.5, 1, -2]
    asking(server)(IMAGES, ["a", "b", "c"])
    first, second = server.bodies
    assert first["asked"] == [2, 0, 1]
    assert second["asked"] == ["a", "b", "c"]
    for text, image in zip(first["images"], IMAGES, strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        assert np.array_equal(decoded, image.permute(1, 2, 0).numpy())


def test_a_server_is_asked_again(server: Server, waits: list[float]) -> None:
    server.answers = [503, {"scores": []}, {"rewards": [1, 2, 3]}]
    total, _ = asking(server)(IMAGES, ASKED)
    assert total.tolist() == [1, 2, 3]
    assert waits == [1, 2]


def test_a_server_without_an_answer(server: Server, waits: list[float]) -> None:
    server.answers = [503, 503]
    score = asking(server, tries=2)
    with pytest.raises(
        RewardFailed,
        match=r"^method\.rewards\.http: http://.*/score gave no rewards, asked 2 times; the last was HTTPE",
    ) as caught:
        score(IMAGES, ASKED)
    assert "\n" not in str(caught.value)
    server.answers = [{"rewards": [1, 2]}]
    with pytest.raises(RewardFailed, match=r"^method\.rewards\.http: gave shape \(2,\) for 3 images"):
        score(IMAGES, ASKED)


# -- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("method.rewards.function.weight=0",), "no reward has a weight; there are clip, hps, classifier, funct"),
        (("method.rewards.function.path=tiny",), "rewards.function.path is 'tiny'; it must be package.module:name"),
        (("method.rewards.http.url=file:///x",), "rewards.http.url is 'file:///x'; it must be an address of http://"),
        (("method.rewards.clap.weight=1",), "unknown key method.rewards.clap; did you mean clip?"),
        (("method.rewards.classifier.weight=1",), "method.rewards.classifier.weights is missing"),
        (("method.group_size=1",), "method.group_size is 1; it must be greater than or equal to 2"),
    ],
)
def test_settings_that_are_refused(pair: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(VarpiError) as caught:
        tiny.recipe(pair, *settings, method="ar_grpo")
    assert message in str(caught.value)
