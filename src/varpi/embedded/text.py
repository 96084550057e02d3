"""Makes the text encoder of the captioned digits: `python -m varpi.embedded.text`, part of `make embedded`.

A real T5 encoder of one small layer, with random weights and a vocabulary of whole words. It is never trained: that a
word has much the same features in every sentence, and others than another word, is all that captions of digits need.
"""

from pathlib import Path

import torch

from varpi.data.digits import WORDS

FOLDER = Path(__file__).parent / "digits-text"
OTHER_WORDS = (
    "a an at black blackboard by child could digit draw drawing for form from hand handwritten i image in "
    "large letter look make me my notebook number numeral of old on painting pen photo picture please "
    "scan see show someone the thick white with written wrote you "
)
"""Beside the digits: those of captions, and more. Another list is another encoder."""


def make(folder: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer into `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS, *OTHER_WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=120
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(vocabulary),
        d_model=128,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    encoder = T5EncoderModel(config)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):  # untrained layers scramble: let the words shine through
                weight.mul_(0.1)
    encoder.save_pretrained(folder)


if __name__ == "__main__":
    make(FOLDER)
