"""The embedded pair of photographs: what it is, and that it says how it was made."""

import torch
import yaml
from safetensors import safe_open

from varpi import generate, load_generator, load_tokenizer
from varpi.recipe import load_recipe
from varpi.runtime.sources import embedded


def test_the_pair_of_photographs_fits_together() -> None:
    generator, tokenizer = load_generator("cifar10"), load_tokenizer("cifar10")
    assert (generator.num_classes, generator.num_tokens, generator.vocab_size) == (10, 64, tokenizer.codebook_size)
    tokens = generate(generator, torch.arange(10), seed=0)
    images = tokenizer.decode(tokens)
    assert images.shape == (10, 3, 32, 32)
    likely = generator.logits(tokens, torch.arange(10)).log_softmax(-1).gather(-1, tokens[..., None]).mean()
    shuffled = tokens[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    unlikely = generator.logits(shuffled, torch.arange(10)).log_softmax(-1).gather(-1, shuffled[..., None]).mean()
    assert likely > unlikely + 0.5  # it has learnt in which order codes come


def test_the_generator_of_photographs_carries_its_recipe() -> None:
    with safe_open(embedded("cifar10", "generator"), "pt") as file:
        metadata = file.metadata()
    made_by, shipped = yaml.safe_load(metadata["recipe"]), load_recipe("cifar10-generator").model_dump(mode="json")
    for recipe in (made_by, shipped):
        for part in ("data", "validation"):
            recipe[part]["split"] = recipe[part]["split"].replace(" ", "")
    assert made_by["seed"] == shipped["seed"]
    for key in ("method", "data", "optimizer", "validation"):
        assert made_by[key].items() <= shipped[key].items(), key  # which may have newer keys
    assert made_by["training"]["steps"] == int(metadata["step"]) == shipped["training"]["steps"]
    assert len(metadata["trained_sha256"]) == 64
