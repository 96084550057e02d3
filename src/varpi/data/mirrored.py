"""Images and their mirror images, as one dataset of twice the length."""

from varpi.data.dataset import Dataset, Item
from varpi.errors import VarpiError


class Mirrored:
    """The n items of a dataset with classes, and after them, at n + index, their left-right mirror images.

    An epoch so holds every image in both forms, and an index says which; nothing is drawn.

    Raises:
        VarpiError: the dataset has captions, which may speak of left and right.
    """

    def __init__(self, dataset: Dataset) -> None:
        if dataset.num_classes is None:
            raise VarpiError("data.flip is for classes; captions may speak of left and right, so leave it out")
        self._dataset = dataset
        self.num_classes = dataset.num_classes
        self.class_names = dataset.class_names

    @property
    def fingerprint(self) -> str:
        """The dataset's, marked."""
        return f"{self._dataset.fingerprint}-mirrored"

    def __len__(self) -> int:
        return 2 * len(self._dataset)

    def __getitem__(self, index: int) -> Item:
        mirrored, original = divmod(index, len(self._dataset))
        item = self._dataset[original]
        return Item(item.image.flip(-1), item.condition) if mirrored else item
