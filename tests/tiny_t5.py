"""A T5 small enough to make within a test: random weights, and a tokenizer that knows a few words."""

from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

import torch


def make(folder: Path, words: Sequence[str], *, width: int = 16, seed: int = 0) -> Path:
    """Fill `folder` with a T5 encoder of `width` channels in transformers' layout; the same every time.

    A token for each of `words` (lower case); letters spell the others, and what is neither becomes <unk>.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    # Unigram, as T5's own: the log-probabilities make a whole word likelier than its letters
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in dict.fromkeys(words)]
    vocabulary += [(letter, -10.0) for letter in ("▁", *ascii_lowercase)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",  # as in flan-t5
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        T5EncoderModel(config).save_pretrained(folder)
    return folder
