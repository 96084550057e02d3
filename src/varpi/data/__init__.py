"""Where (image, condition) pairs come from."""

from varpi.data.captions import clean_caption
from varpi.data.dataset import BadImage, Captioned, Dataset, Dropped, Item
from varpi.data.loader import Batch, Batches
from varpi.data.source import open_dataset
from varpi.data.transforms import center_crop, to_tensor

__all__ = [
    "BadImage",
    "Batch",
    "Batches",
    "Captioned",
    "Dataset",
    "Dropped",
    "Item",
    "center_crop",
    "clean_caption",
    "open_dataset",
    "to_tensor",
]
