"""The page itself, in Gradio: three tabs, and nothing that outlives a visit.

A visitor's own things are the values of the page and one `gr.State`, which Gradio keeps apart by session. The models
are shared and never changed; requests that use them wait in one queue and are served one after the other.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from gradio.themes import Default
from gradio.themes.utils import colors
from markupsafe import Markup

from varpi.errors import VarpiError
from varpi.play.frames import draw_frames
from varpi.play.opened import Playground
from varpi.play.picture_step import read_picture, take_step
from varpi.play.showing import code_colors, find_studies, show_error, show_frame, show_status, show_step, show_study
from varpi.sampling.settings import Sampling

MOST_IMAGES = 9
"""Drawn by each model in a request."""
LARGEST_GROUP = 16
"""Samples of a picture in a request."""
QUEUE = 16
"""Requests that wait; one more is refused."""
LARGEST_SEED = 2**53 - 1
"""A browser's numbers are exact up to it."""
FORGOTTEN = 3600
"""Seconds after which a picture is forgotten, if its page is not closed before."""
THEME = Default(
    primary_hue=colors.teal,
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Liberation Sans", "sans-serif"],
    font_mono=["ui-monospace", "SF Mono", "Menlo", "Consolas", "Liberation Mono", "monospace"],
)
"""With fonts that are on the machine: Gradio's own are asked of others."""
USES_MODELS: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1, "show_progress": "hidden"}
"""Of every event that uses the models."""
USES_NONE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
"""Of every event that does not: it takes no place in the queue, which a page that opens could find full."""
ALIVE = "() => { document.documentElement.dataset.alive = 'yes' }"
"""What a page does as soon as it listens to its buttons; until then they are dim and take no click."""


def build_app(playground: Playground, studies: Sequence[Path]) -> gr.Blocks:
    """The page. studies: files and directories in which the third tab finds studies."""
    with gr.Blocks(title="varpi play", analytics_enabled=False, delete_cache=(60, 60)) as app:
        names = " and ".join(f"`{player.name}`" for player in playground.players)
        gr.Markdown(f"## ϖ\u2002varpi play\n{names}")
        with gr.Tab("Generate"):
            _generating(playground)
        with gr.Tab("Your picture"):
            _picturing(playground)
        with gr.Tab("Studies"):
            _studying(app, studies)
        app.load(None, None, None, js=ALIVE)
    return app


def stylesheet() -> str:
    return (resources.files("varpi.play") / "play.css").read_text(encoding="utf-8")


def _generating(playground: Playground) -> None:
    names = [player.name for player in playground.players]
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            asked = _asking(playground)
            images = gr.Slider(1, MOST_IMAGES, value=4, step=1, precision=0, label="Images")
            guidance = gr.Slider(1, 10, value=1, step=0.05, label="Guidance scale", info="1: none, at half the cost")
            seed = _seed()
            with gr.Accordion("How tokens are drawn", open=False):
                temperature = gr.Slider(0.05, 2, value=1, step=0.05, label="Temperature")
                most = playground.pair.generator.vocab_size
                top_k = gr.Slider(0, most, value=0, step=1, precision=0, label="Top-k", info="0: from all")
                top_p = gr.Slider(0.05, 1, value=1, step=0.01, label="Top-p", info="1: from all")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="generate", min_width=100)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(show_status("Nothing is drawn yet."), elem_classes="shown", elem_id="drawn-status")
            drawn = gr.HTML("", elem_classes="shown", elem_id="drawn")

    def draw(
        asked: Any, images: int, guidance: float, seed: int | None, temperature: float, top_k: int, top_p: float
    ) -> Iterator[tuple[Markup, Any]]:
        try:
            sampling = Sampling(
                guidance_scale=guidance, temperature=temperature, top_k=top_k, top_p=top_p, seed=_checked_seed(seed)
            )
            condition, called = _condition(playground, asked, images)
            for frame in draw_frames(playground.players, condition, sampling):
                said = f"Row {frame.row} of {frame.rows}" if frame.row < frame.rows else "Done"
                yield show_status(f"{said}: {called}, seed {seed}."), show_frame(names, called, frame)
        except (VarpiError, torch.OutOfMemoryError) as error:
            yield show_error(_said(error, "ask for fewer images")), gr.skip()

    inputs = [asked, images, guidance, seed, temperature, top_k, top_p]
    drawing = start.click(draw, inputs, [status, drawn], api_visibility="private", **USES_MODELS)
    stop.click(lambda: show_status("Stopped."), None, status, cancels=[drawing], api_visibility="private", **USES_NONE)


def _picturing(playground: Playground) -> None:
    colors = {id(player): code_colors(player.pair.tokenizer) for player in playground.players}
    settings = playground.settings
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="A picture of yours", file_types=["image"], height=165, elem_id="upload")
            gr.Markdown("Its file is deleted as soon as it is read; the picture is forgotten with this page.")
            asked = _asking(playground)
            which = gr.Radio(
                [(player.name, i) for i, player in enumerate(playground.players)],
                value=len(playground.players) - 1,
                label="By",
                visible=len(playground.players) > 1,
            )
            usual = min(max(settings.group_size, 2), LARGEST_GROUP)
            group = gr.Slider(2, LARGEST_GROUP, value=usual, step=1, precision=0, label="G, samples")
            noise = gr.Slider(0, 1, value=settings.context_noise, step=0.05, label="ξ, context noise")
            seed = _seed()
            start = gr.Button("Take the step", variant="primary", elem_id="step")
            gr.Markdown(playground.about_reward)
        with gr.Column(scale=3, min_width=300):
            said = show_status("Give a picture, say what it shows, and take the step.")
            status = gr.HTML(said, elem_classes="shown", elem_id="step-status")
            shown = gr.HTML("", elem_classes="shown", elem_id="step-shown")
    held = gr.State(None, time_to_live=FORGOTTEN)

    def take_in(path: str | None) -> tuple[None, Any, Any]:
        if path is None:
            return None, gr.skip(), gr.skip()
        place = Path(path)
        try:
            picture = read_picture(place.read_bytes(), playground.pair)
        except VarpiError as error:
            return None, None, show_error(str(error))
        except OSError:
            return None, None, show_error("the picture was lost on the way; give it again")
        finally:
            place.unlink(missing_ok=True)
            with suppress(OSError):
                place.parent.rmdir()  # whose name is a hash of the file
        side = playground.pair.image_size
        return None, picture, show_status(f"The picture is here, cut to {side}x{side} pixels. Take the step.")

    def step(
        picture: np.ndarray | None, asked: Any, which: int, group: int, noise: float, seed: int | None
    ) -> tuple[Markup, Any]:
        if picture is None:
            return show_error("Give a picture first."), gr.skip()
        player = playground.players[which]
        try:
            condition, called = _condition(playground, asked, 1)
            found = take_step(
                playground,
                player.pair,
                picture,
                condition,
                group_size=group,
                context_noise=noise,
                seed=_checked_seed(seed),
            )
        except (VarpiError, torch.OutOfMemoryError) as error:
            return show_error(_said(error, "ask for fewer samples")), gr.skip()
        done = f"VA-π's step by {player.name}, asked for {called}, up to the advantages; nothing is trained."
        return show_status(done), show_step(found, picture, colors[id(player)])

    file.upload(take_in, file, [file, held, status], api_visibility="private", **USES_NONE)
    start.click(
        step, [held, asked, which, group, noise, seed], [status, shown], api_visibility="private", **USES_MODELS
    )


def _studying(app: gr.Blocks, places: Sequence[Path]) -> None:
    where = ", ".join(map(str, places))
    choice = gr.Dropdown([], label="Study", elem_id="study")
    shown = gr.HTML("", elem_classes="shown", elem_id="study-shown")

    def look() -> tuple[Any, Any]:
        found = [str(path) for path in find_studies(places)]
        return gr.Dropdown(found, value=found[0] if found else None), show(found[0] if found else None)

    def show(path: str | None) -> Markup:
        if path is None:
            return show_status(f"No study.json below {where}: `varpi study` makes one, --studies says where one is.")
        try:
            if Path(path) not in find_studies(places):  # what a browser sends may be any path
                raise VarpiError("there is no such study any more; load the page again")
            return show_study(Path(path))
        except VarpiError as error:
            return show_error(str(error))

    app.load(look, None, [choice, shown], api_visibility="private", **USES_NONE)
    choice.input(show, choice, shown, api_visibility="private", **USES_NONE)


# -- what tabs share


def _asking(playground: Playground) -> Any:
    """The control that says what to draw."""
    if playground.pair.generator.num_classes is None:
        return gr.Textbox(label="Prompt", lines=2, max_length=1000, elem_classes="asked")
    return gr.Dropdown(playground.classes(), value=0, label="Class", elem_classes="asked")


def _condition(playground: Playground, asked: Any, count: int) -> tuple[Any, str]:
    """The condition of `count` images, and what it is called."""
    if playground.pair.generator.num_classes is None:
        prompt = (asked or "").strip()
        if not prompt:
            raise VarpiError("say in the prompt what to draw")
        check = playground.pair.generator.caption_check
        if check is not None:
            check(prompt, "the prompt")
        return [prompt] * count, f"“{prompt}”"
    named = {number: name for name, number in playground.classes()}
    if asked not in named:
        raise VarpiError("choose a class")
    return torch.tensor([asked] * count), f"class {named[asked].removeprefix('class ')}"


def _seed() -> gr.Number:
    with gr.Row(elem_classes="seed"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=120, scale=3)
        other = gr.Button("Another", size="sm", min_width=80, scale=1)
    other.click(lambda: random.randrange(2**31), None, seed, api_visibility="private", **USES_NONE)
    return seed


def _checked_seed(seed: int | None) -> int:
    if seed is None:
        raise VarpiError("give a seed: a whole number")
    return seed


def _said(error: Exception, advice: str) -> str:
    return str(error) if isinstance(error, VarpiError) else f"out of memory: {advice}"
