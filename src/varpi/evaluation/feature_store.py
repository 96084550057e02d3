"""The features of a set of images on disk, in chunks: what makes an evaluation resumable, shared and repeatable.

Each chunk is written aside and renamed, so it is there whole or not at all. Its numbers depend on its images, the
network and the batch size alone, neither on who computes it nor on when.

Shapes: N images, D features.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from varpi.errors import VarpiError
from varpi.evaluation.statistics import Moments, moments_of_parts
from varpi.networks.extractors import FeatureExtractor
from varpi.runtime.files import write_aside, write_text
from varpi.runtime.parts import wait
from varpi.samples.reading import HashedImages, SampleSet, contents_sha256

CHUNK = 512
"""Images in one file of features: 10 MB on Inception."""
_DIGESTS = "digests"


@dataclass(frozen=True)
class FeatureStore:
    """The features of one set on one network, as files of `CHUNK` images."""

    folder: Path
    images: SampleSet
    streams: Mapping[str, int]
    key: str
    """Of the images, when the store was opened."""

    @classmethod
    def of(cls, cache: Path, images: SampleSet, extractor: FeatureExtractor) -> "FeatureStore":
        """The store of a set in a cache, perhaps with features in it already."""
        about = {"images": images.key, "extractor": dict(extractor.identity), "chunk": CHUNK}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        folder = cache / f"{extractor.name}-{digest[:20]}"
        return cls(folder, images, extractor.streams, about["images"])

    @property
    def chunks(self) -> list[range]:
        """The images of each file."""
        count = self.images.count
        return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]

    def extract(
        self, extractor: FeatureExtractor, *, batch_size: int, workers: int, share: tuple[int, int], progress: bool
    ) -> None:
        """Compute the chunks that are not there yet; of `share` (r, n), those of number r, r + n, r + 2n, …"""
        rank, size = share
        if rank == 0 and not (self.folder / "about.json").is_file():  # for whoever wonders what lies there
            about = {"source": self.images.source, "images": self.key, "extractor": dict(extractor.identity)}
            write_text(self.folder / "about.json", json.dumps(about, indent=2) + "\n")
        missing = [number for number in range(len(self.chunks))[rank::size] if not self._is_complete(number)]
        ranges = [
            range(start, min(start + batch_size, self.chunks[number].stop))
            for number in missing
            for start in range(self.chunks[number].start, self.chunks[number].stop, batch_size)
        ]
        batches = self.images.batches(ranges, workers)
        with Progress(console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task(self.images.source, total=sum(map(len, ranges)))
            for number in missing:
                parts: list[tuple[dict[str, Tensor], HashedImages]] = []
                while sum(len(batch.images) for _, batch in parts) < len(self.chunks[number]):
                    batch = next(batches)
                    parts.append((extractor(batch.images), batch))
                    bar.advance(task, len(batch.images))
                self._write(number, parts)

    def wait(self) -> None:
        """Wait until every chunk is there, and see that the images are still those that were read.

        Raises:
            VarpiError: a chunk does not appear, perhaps because not all processes see this cache; or they are not.
        """
        for number in range(len(self.chunks)):
            wait(lambda number=number: self._is_complete(number) or None, f"{self._path(number)}")
        if self.images.key != self.key:
            raise VarpiError(f"{self.images.source}: its files changed while they were measured; evaluate them again")

    def sha256(self) -> str:
        """Of the images' contents."""
        return contents_sha256(self.images.height, self.images.width, self._parts(_DIGESTS))

    def moments(self, stream: str) -> Moments:
        """Of all vectors of a stream, of which a chunk is held at a time."""
        return moments_of_parts(self._parts(stream))

    def vectors(self, stream: str, most: int | None = None) -> np.ndarray:
        """A stream as float32 (N,D), in the order of the images; of more than `most`, that many at even distances."""
        count = self.images.count
        rows = np.arange(count) if most is None or most >= count else np.arange(most) * count // most
        numbers = rows // CHUNK
        return np.concatenate(
            [part[rows[numbers == number] - number * CHUNK] for number, part in enumerate(self._parts(stream))]
        )

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _parts(self, name: str) -> Iterator[np.ndarray]:
        for number in range(len(self.chunks)):
            try:
                with safe_open(self._path(number), framework="np") as file:
                    part = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise VarpiError(f"{self._path(number)}: cannot be read; remove it and evaluate again") from error
            yield part

    def _is_complete(self, number: int) -> bool:
        try:
            with safe_open(self._path(number), framework="np") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return False
        count = len(self.chunks[number])
        expected = {name: (count, width) for name, width in self.streams.items()}
        return shapes == {**expected, _DIGESTS: (count, 32)}

    def _write(self, number: int, parts: Sequence[tuple[dict[str, Tensor], HashedImages]]) -> None:
        images = self.chunks[number]
        tensors = {_DIGESTS: torch.from_numpy(np.concatenate([batch.digests for _, batch in parts]))}
        for name, width in self.streams.items():
            stream = torch.cat([features[name] for features, _ in parts]).cpu().contiguous()
            if stream.shape != (len(images), width) or stream.dtype != torch.float32:
                raise VarpiError(
                    f"the extractor's stream {name!r} is {stream.dtype} {tuple(stream.shape)}; "
                    f"it must be float32 ({len(images)}, {width})"
                )
            bad = (~stream.isfinite()).any(dim=1).nonzero().flatten()
            if len(bad):
                raise VarpiError(
                    f"{self.images.source}: {len(bad)} images, first number {images.start + int(bad[0])}, have "
                    f"features ({name}) that are NaN or infinite; check the weights, or use precision fp32"
                )
            tensors[name] = stream
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_aside(self._path(number), lambda aside: save_file(tensors, aside), size=size)
