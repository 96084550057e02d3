"""From captions to T5 features, as LlamaGen's text-conditional models were trained on them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varpi.data.caption_check import refuse_emptied
from varpi.data.captions import clean_caption
from varpi.errors import VarpiError
from varpi.runtime import hub
from varpi.runtime.files import line

_VOCABULARIES = ("tokenizer.json", "spiece.model")


class TextEncoder:
    """The encoder of a T5 and its tokenizer, frozen.

    Args:
        source: a directory in transformers' layout, or a Hub id ("google/flan-t5-xl", the encoder of LlamaGen's
            released models; "org/name@revision").
        max_tokens: longer captions are cut to this many tokens, the closing `</s>` included. LlamaGen's is 120.
        device: where the encoder computes, and where the features are.
        dtype: of its weights. LlamaGen's is bfloat16.

    Raises:
        VarpiError: nothing is there, it lacks a file or a weight, it is no T5, or a package is missing.
    """

    caption_check = staticmethod(refuse_emptied)
    """What leaves out captions of which cleaning leaves nothing; too long ones it cuts."""

    def __init__(
        self,
        source: str | Path,
        *,
        max_tokens: int = 120,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if max_tokens < 1:
            raise VarpiError(f"max_tokens is {max_tokens}; it must be at least 1, for the closing </s>")
        clean_caption("")  # a missing package had better show before gigabytes are loaded
        self.source = str(source)
        self.max_tokens = max_tokens
        self.device = torch.device(device)
        self.batch_size = 32
        """Captions in one pass of the encoder."""
        self._tokenizer, model = _load(_folder(self.source), self.source, dtype)
        self._model = model.eval().requires_grad_(False).to(self.device)
        self.width: int = model.config.d_model
        """C, the channels of the features."""

    @torch.no_grad()  # not inference_mode: a generator is trained on these tensors
    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption: float32 (L, C) on `device`, L in [1, max_tokens], `</s>` last, no padding.

        The captions are cleaned first (`clean_caption`, twice). They are padded on the right to the longest of a batch
        and masked, so that the result depends on their company by no more than rounding.

        Raises:
            VarpiError: a caption is not a string.
        """
        if isinstance(captions, str):
            raise VarpiError("the text encoder takes a list of captions, not a single string")
        cleaned = [clean_caption(clean_caption(caption)) for caption in captions]
        features: list[Tensor] = []
        for start in range(0, len(cleaned), self.batch_size):
            features += self._encode(cleaned[start : start + self.batch_size])
        return features

    def _encode(self, captions: list[str]) -> list[Tensor]:
        tokens = self._tokenizer(
            captions, max_length=self.max_tokens, truncation=True, padding="longest", return_tensors="pt"
        ).to(self.device)
        mask = tokens["attention_mask"]
        # A generator that trains in mixed precision may call from within autocast; stored features must be the same
        with torch.autocast(self.device.type, enabled=False):
            hidden = self._model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        return [row[valid].float() for row, valid in zip(hidden, mask.bool(), strict=True)]


def _load(folder: Path, where: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and encoder of the T5 in `folder`."""
    try:
        from transformers import AutoTokenizer, T5EncoderModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise VarpiError(f"the text encoder needs {error.name}: pip install 'varpi[text]'") from error
    disable_progress_bar()  # of a second's work, amid the lines of a run
    config = _read(folder, "config.json", where)
    if config is None:
        raise VarpiError(f"{where}: holds no config.json; expected a T5 in transformers' layout")
    if (kind := config.get("model_type") if isinstance(config, dict) else None) != "t5":
        raise VarpiError(f"{where}: is a model of type {kind!r}; the text encoder must be a T5")
    if not any((folder / name).is_file() for name in _VOCABULARIES):  # transformers would make an empty tokenizer up
        raise VarpiError(f"{where}: holds no tokenizer ({' or '.join(_VOCABULARIES)})")
    settings = _read(folder, "tokenizer_config.json", where)
    if isinstance(settings, dict) and not _few_enough(extra := settings.get("extra_ids", 0)):
        raise VarpiError(f"{where}: its tokenizer_config.json asks for {extra!r:.40} extra_ids; a T5 has 100")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="right", truncation_side="right", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # which exception a damaged file raises depends on its format
        raise VarpiError(f"{where}: its tokenizer cannot be loaded ({line(error)})") from error
    try:
        loaded: Any = T5EncoderModel.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except Exception as error:
        raise VarpiError(f"{where}: its weights cannot be loaded ({line(error)})") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers draws these at random
        raise VarpiError(f"{where}: {len(missing)} weights of the encoder are missing, {missing[0]} for one")
    if len(tokenizer) > model.config.vocab_size:
        raise VarpiError(
            f"{where}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; "
            "they do not belong together"
        )
    return tokenizer, model


def _read(folder: Path, name: str, where: str) -> Any:
    """What a JSON file holds; None where there is no such file."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise VarpiError(f"{where}: its {name} cannot be read ({line(error)})") from error


def _few_enough(extra: Any) -> bool:
    """Whether transformers may make that many tokens up, each a string."""
    return isinstance(extra, int) and 0 <= extra <= 2**16


def _folder(source: str) -> Path:
    """The directory that `source` means, downloaded if need be."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    match = hub.ID.fullmatch(source)
    if path.exists() or not match or match["file"]:
        raise VarpiError(f"{source}: no such directory, nor a Hub id (org/name[@revision]); expected a T5")
    repository = hub.Repository(match["repo"], match["revision"])
    weights = ".safetensors" if any(name.endswith(".safetensors") for name in repository.names) else ".bin"
    endings = (".json", "spiece.model", weights)
    files = [name for name in repository.names if "/" not in name and name.endswith(endings)]
    if not files:
        raise VarpiError(f"{repository.where}: holds no model in transformers' layout")
    return repository.download(files)
