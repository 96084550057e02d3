"""The embedded pair of captioned shapes: it draws what it is asked for, and says how it was made."""

from pathlib import Path

import yaml
from safetensors import safe_open

from varpi.data.prompts import GENEVAL_TASKS
from varpi.recipe import load_recipe
from varpi.runtime.sources import embedded
from varpi.sampling.settings import Sampling
from varpi.studies.plan import START, Judge, StudyData
from varpi.studies.tasks import TOKENS, Subject, Weights, draw_tokens, measure_tokens


def test_the_pair_of_shapes_draws_what_it_is_asked_for(tmp_path: Path) -> None:
    weights = Weights(START, "shapes", "shapes", "", "")
    subject = Subject(None, StudyData(source="shapes", image_size=32), "test")
    drawn = draw_tokens(tmp_path, weights, subject, Sampling(seed=0, guidance_scale=2.0), 60, 60, 2, "cpu")
    assert (tmp_path / TOKENS).is_file()
    assert [len(tokens) for tokens in drawn["shown"]] == [64, 64]
    judge = Judge(name="shapes-detector")
    seen = measure_tokens(tmp_path, tmp_path, weights, subject, judge, ["overall", *GENEVAL_TASKS], 60, tmp_path, "cpu")
    assert seen["metrics"]["single_object"] >= 0.8
    assert seen["metrics"]["overall"] >= 0.3


def test_the_pair_of_shapes_carries_its_recipes() -> None:
    for part in ("tokenizer", "generator"):
        with safe_open(embedded("shapes", part), "pt") as file:
            metadata = file.metadata()
        made_by, shipped = yaml.safe_load(metadata["recipe"]), load_recipe(f"shapes-{part}").model_dump(mode="json")
        assert made_by["seed"] == shipped["seed"]
        for key in ("method", "data", "optimizer", "training", "validation"):
            assert made_by[key].items() <= shipped[key].items(), key  # which may have newer keys
        assert int(metadata["step"]) == shipped["training"]["steps"]
        assert len(metadata["trained_sha256"]) == 64
