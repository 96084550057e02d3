"""Makes the text encoders of the captioned digits and shapes: `python -m varpi.embedded.text`, part of `make embedded`.

Real T5 encoders of one small layer, with random weights and a vocabulary of whole words, never trained. Captions of
digits need no more than that a word has much the same features in every sentence, and others than another word. Those
of shapes also say which colour belongs to which shape: each head looks at the word at one distance, so that a word's
features tell its neighbours too, as a trained encoder's do.
"""

from pathlib import Path
from typing import Any

import torch

from varpi.data.digits import WORDS
from varpi.data.scenes import SHAPE_COLORS, SHAPES, plural

FOLDER = Path(__file__).parent
OTHER_WORDS = (
    "a an at black blackboard by child could digit draw drawing for form from hand handwritten i image in "
    "large letter look make me my notebook number numeral of old on painting pen photo picture please "
    "scan see show someone the thick white with written wrote you "
)
"""Beside the digits: those of captions, and more. Another list is another encoder."""


SHAPE_WORDS = (
    *["a", "above", "an", "and", "below", "four", "left", "of", "photo", "right", "three", "two"],
    *SHAPE_COLORS,
    *SHAPES,
    *map(plural, SHAPES),
)
NEIGHBORS = (-4, -3, -2, -1, 1, 2, 3, 4)
"""How many words further on each head of the shapes' encoder looks."""


def make_digits_encoder(folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into `folder`."""
    encoder = _encoder(_write_tokenizer(folder, [*WORDS, *OTHER_WORDS.split()]), heads=2)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):  # untrained layers scramble: let the words shine through
                weight.mul_(0.1)
    encoder.save_pretrained(folder)


def make_shapes_encoder(folder: Path) -> None:
    """The same for the shapes."""
    encoder = _encoder(_write_tokenizer(folder, list(SHAPE_WORDS)), heads=len(NEIGHBORS))
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(0.1)
        attention.q.weight.zero_()  # the place alone decides where a head looks
        attention.relative_attention_bias.weight.zero_()
        for head, distance in enumerate(NEIGHBORS):
            # T5's buckets: of words further on in the upper half, by the distance itself where it is small
            half = attention.relative_attention_num_buckets // 2
            attention.relative_attention_bias.weight[half * (distance > 0) + abs(distance), head] = 20.0
    encoder.bfloat16().save_pretrained(folder)


def _write_tokenizer(folder: Path, words: list[str]) -> int:
    """Write it; the size of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=120
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def _encoder(vocabulary: int, heads: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


if __name__ == "__main__":
    make_digits_encoder(FOLDER / "digits-text")
    make_shapes_encoder(FOLDER / "shapes-text")
