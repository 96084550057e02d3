"""The flags of sampling say and give what `Sampling` holds."""

import argparse

import pytest

from varpi.cli.sampling_flags import add_flags, settings_of
from varpi.errors import VarpiError
from varpi.sampling.settings import Sampling


def parsed(*arguments: str) -> Sampling:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return settings_of(parser.parse_args(arguments))


def test_without_flags_the_settings_are_the_defaults_and_the_seed_is_0() -> None:
    assert parsed() == Sampling(seed=0)


def test_each_setting_has_a_flag() -> None:
    given = "--guidance-scale 2.5 --guidance-interval 7 --guidance-schedule power-cosine --guidance-power 1.5"
    given += " --temperature 0.8 --top-k 20 --top-p 0.9 --greedy --seed 4"
    assert parsed(*given.split()) == Sampling(
        guidance_scale=2.5,
        guidance_interval=7,
        guidance_schedule="power-cosine",
        guidance_power=1.5,
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        greedy=True,
        seed=4,
    )


def test_values_out_of_range_are_refused_by_the_settings() -> None:
    with pytest.raises(VarpiError, match=r"top_p is 1.5; it must be in \(0, 1\]"):
        parsed("--top-p", "1.5")
