"""Means, spreads, paired differences and winners, by hand."""

import pytest

from varpi.studies.summary import UNTRAINED, is_clear, paired_difference, summarize_seeds, winner

TRAINED = {"0": [1.0, 3.0], "1": [4.0, 8.0]}  # means 2 and 6
OTHER = {"0": [2.0, 3.0], "1": [5.5, 9.5]}
BASE = {UNTRAINED: [5.0, 7.0]}


def test_spreads_over_training_seeds_and_over_sampling_seeds() -> None:
    summary = summarize_seeds(TRAINED)
    assert summary["mean"] == 4
    assert summary["spread"] == pytest.approx(8**0.5)  # of 2 and 6
    assert summary["sampling_spread"] == pytest.approx((2**0.5 + 8**0.5) / 2)
    assert summarize_seeds(BASE) == {
        "mean": 6, "spread": None, "sampling_spread": pytest.approx(2**0.5), "values": BASE
    }  # fmt: skip
    assert summarize_seeds({"0": [1.0]})["sampling_spread"] is None


def test_differences_of_pairs() -> None:
    paired = paired_difference(OTHER, TRAINED)
    assert paired["values"] == [0.5, 1.5]  # by training seed, over sampling seeds
    assert (paired["mean"], paired["spread"]) == (1.0, pytest.approx(0.5**0.5))
    against_base = paired_difference(TRAINED, BASE)  # -4, -4 and -1, 1
    assert (against_base["values"], against_base["mean"]) == ([-4.0, 0.0], -2.0)
    assert paired_difference(BASE, TRAINED)["values"] == [4.0, 0.0]
    untrained = paired_difference(BASE, {UNTRAINED: [4.0, 4.0]})  # over sampling seeds, as nothing was trained
    assert (untrained["values"], untrained["spread"]) == ([1.0, 3.0], pytest.approx(2**0.5))
    assert paired_difference({"0": [1.0, 2.0]}, BASE)["spread"] is None
    assert paired_difference({"0": [1.0], "1": [2.0]}, {"1": [5.0]})["values"] == [-3.0]


def test_what_an_untrained_row_adds_to_every_pair_is_no_gain() -> None:
    """Shares of a few right images: trainings that all gave the same, beside a base that two samplings tell apart."""
    trained, base = {"0": [0.01, 0.02], "1": [0.015, 0.015]}, {UNTRAINED: [0.015, 0.0]}
    paired = paired_difference(trained, base)
    assert (paired["mean"], paired["spread"]) == (pytest.approx(0.0075), pytest.approx(0, abs=1e-15))
    assert paired["sampling_spread"] == pytest.approx(0.02 / 2**0.5)  # of -0.0025 and 0.0175
    assert not is_clear(paired)
    assert winner({"trained": trained, "base": base}, lower_is_better=False) is None
    assert paired_difference({"0": [1.0], "1": [2.0]}, {"0": [0.0], "1": [0.0]})["sampling_spread"] is None


def test_a_winner_beats_every_other_by_more_than_the_spread() -> None:
    assert winner({"a": TRAINED, "b": OTHER}, lower_is_better=True) == "a"  # by 1, spread 0.71
    assert winner({"a": TRAINED, "b": OTHER}, lower_is_better=False) == "b"
    assert winner({"a": TRAINED, "b": OTHER, "base": BASE}, lower_is_better=True) is None  # by 2, spread 2.8
    assert winner({"a": TRAINED, "same": dict(TRAINED), "b": OTHER}, lower_is_better=True) == "a"
    assert winner({"a": {"0": [1.0]}, "b": {"0": [9.0]}}, lower_is_better=True) is None  # no spread
    assert winner({"a": TRAINED}, lower_is_better=True) is None
    assert winner({"a": TRAINED, "same": dict(TRAINED)}, lower_is_better=True) is None
