"""Images that appear row by row: what is shown is what was drawn, and no more is drawn than is looked at."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from play_parts import playground

from varpi.data.pixels import to_uint8
from varpi.play import frames
from varpi.play.frames import decode_rows, draw_frames
from varpi.sampling.generate import generate_with
from varpi.sampling.settings import Sampling

CLASSES = torch.tensor([0, 2])
SAMPLING = Sampling(seed=4, guidance_scale=1.5, top_k=20)


def test_the_last_frame_is_what_generating_gives_and_the_others_lead_there() -> None:
    players = playground("base", "tuned").players
    made = list(draw_frames(players, CLASSES, SAMPLING))
    assert (made[0].row, made[-1].row, made[-1].rows) == (1, 4, 4)
    for i, player in enumerate(players):
        tokens = generate_with(player.pair.generator, CLASSES, SAMPLING)
        whole = to_uint8(player.pair.tokenizer.decode(tokens))
        assert np.array_equal(made[-1].images[i][..., :3], whole)
        assert (made[-1].images[i][..., 3] == 255).all()
        for frame in made:
            assert np.array_equal(frame.images[i], decode_rows(player.pair, tokens[:, : 4 * frame.row]))
    assert not np.array_equal(made[-1].images[0], made[-1].images[1])  # two generators, not one twice


def test_what_is_not_drawn_is_blank() -> None:
    pair = playground().pair
    tokens = generate_with(pair.generator, CLASSES, SAMPLING)
    frame = decode_rows(pair, tokens[:, :8])
    assert frame.shape == (2, 16, 16, 4)
    assert (frame[:, :8, :, 3] == 255).all()
    assert (frame[:, 8:] == 0).all()
    again = torch.cat([tokens[:, :8], tokens[:, 4:8], tokens[:, 4:8]], dim=1)
    assert np.array_equal(frame[:, :8, :, :3], to_uint8(pair.tokenizer.decode(again))[:, :8])


def test_slow_decoding_leaves_rows_out_but_not_the_first_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(frames, "perf_counter", lambda: now[0])
    step, decode, players = 1.0, frames.decode_rows, playground().players

    def slowly(pair, tokens):
        now[0] += 10 * step
        return decode(pair, tokens)

    rows = frames.generate_rows

    def drawn(*given):
        for tokens in rows(*given):
            now[0] += step
            yield tokens

    monkeypatch.setattr(frames, "decode_rows", slowly)
    monkeypatch.setattr(frames, "generate_rows", drawn)
    assert [frame.row for frame in draw_frames(players, CLASSES, SAMPLING)] == [1, 4]
    step = 0.0  # decoding takes no time
    assert [frame.row for frame in draw_frames(players, CLASSES, SAMPLING)] == [1, 2, 3, 4]


def test_closing_stops_the_drawing_of_every_player(monkeypatch: pytest.MonkeyPatch) -> None:
    players = playground("base", "tuned").players
    steps = []
    for player in players:
        step = player.pair.generator.decode_step
        counted = SimpleNamespace(step=step)
        monkeypatch.setattr(
            player.pair.generator, "decode_step", lambda *given, c=counted: (steps.append(1), c.step(*given))[1]
        )
    drawing = draw_frames(players, CLASSES, SAMPLING)
    next(drawing)
    drawing.close()
    assert len(steps) == 2 * 3
    assert list(drawing) == []
