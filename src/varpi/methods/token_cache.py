"""The tokens of a whole data set, made once with a frozen tokenizer and kept in a file.

n images of N tokens.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varpi.data import BadImage, Dataset, Dropped
from varpi.errors import VarpiError
from varpi.runtime.files import line, write_aside
from varpi.tokenizers import Tokenizer

_BATCH = 64
_MISSING = -1


def cached_tokens(
    dataset: Dataset, tokenizer: Tokenizer, folder: str | Path, *, image_size: int, device: str
) -> Tensor:
    """Tokens int32 (n,N) of every image of `dataset`, in its order; those of an image that cannot be used are -1.

    They are in `folder`, in a file that is named after the tokenizer's weights, the data's fingerprint and the image
    size; where it is missing they are computed and written. Interrupted, that begins anew. Processes that find no file
    at the same time each compute it, and write the same.

    Raises:
        VarpiError: the file cannot be written, or it holds something else.
    """
    path = Path(folder, f"tokens-{_key(dataset, tokenizer, image_size)}.safetensors")
    if not path.is_file():
        tokens = _encode(dataset, tokenizer, device)
        write_aside(path, lambda aside: save_file({"tokens": tokens}, aside), size=tokens.nbytes)
    try:
        tokens = load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError) as error:
        raise VarpiError(f"{path}: holds no tokens ({line(error)}); delete it, and it is made again") from error
    if len(tokens) != len(dataset):
        raise VarpiError(
            f"{path}: holds {len(tokens)} images, the data {len(dataset)}; delete it, and it is made again"
        )
    return tokens


def _key(dataset: Dataset, tokenizer: Tokenizer, image_size: int) -> str:
    digest = hashlib.sha256(f"{dataset.fingerprint} {len(dataset)} {image_size}".encode())
    assert isinstance(tokenizer, nn.Module)
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _encode(dataset: Dataset, tokenizer: Tokenizer, device: str) -> Tensor:
    tokens: Tensor | None = None
    for first in range(0, len(dataset), _BATCH):
        images: list[Tensor] = []
        indices: list[int] = []
        for index in range(first, min(first + _BATCH, len(dataset))):
            with suppress(BadImage, Dropped):
                images.append(dataset[index].image)
                indices.append(index)
        if images:
            found = tokenizer.encode(torch.stack(images).to(device)).cpu().int()
            if tokens is None:
                tokens = torch.full((len(dataset), found.shape[1]), _MISSING, dtype=torch.int32)
            tokens[torch.tensor(indices)] = found
    if tokens is None:
        raise VarpiError(f"none of the {len(dataset)} training images could be read, so there are no tokens to cache")
    return tokens
