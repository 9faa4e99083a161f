"""Data sets cut into training, held-out and test images: uint8 tensors in memory, or read item by item."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from digitdist.checkpoint import weights_sha256
from digitdist.data.info import DataSetInfo


class Share(NamedTuple):
    """One rank's images of a global batch: positions in a data set, int64 [n], on its device; n may be 0. `epoch` is the one
    they are read in.

    A tuple, since Accelerate takes an empty tensor for a batch that is not there.
    """

    positions: Tensor
    epoch: int = 0


class Batch(NamedTuple):
    """Images uint8 [n, h, w], or [n, 3, h, w] in colour, labels int64 [n], and the images' indices int64 [n]."""

    images: Tensor
    labels: Tensor
    indices: Tensor

    def span(self, span: slice) -> Batch:
        return Batch(self.images[span], self.labels[span], self.indices[span])


class ImageSet(Dataset[Batch]):
    """Labelled images in memory: `images` uint8 [n, h, w] or [n, 3, h, w], `labels` int64 [n], `indices` int64 [n].

    An index is an image's position in the split as it is published, so that it names one image for good.
    """

    workers = 0

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor | None = None):
        self.images, self.labels = images, labels
        self.indices = torch.arange(len(images)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> Batch:
        return Batch(self.images[position], self.labels[position], self.indices[position])

    def __getitems__(self, share: Share) -> Batch:
        """A whole batch at once, on the device of the images: what a `DataLoader` calls."""
        return Batch(*(tensor.index_select(0, share.positions) for tensor in (self.images, self.labels, self.indices)))

    def read(self, positions: Tensor) -> Batch:
        """The images at `positions`, int64 [n]."""
        return self.__getitems__(Share(positions.to(self.indices.device)))

    def subset(self, positions: Tensor) -> ImageSet:
        return ImageSet(*self.read(positions))

    def to(self, device: torch.device) -> ImageSet:
        """The same images on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.indices.to(device))

    def sample(self, positions: Tensor) -> Batch:
        """What stands for the whole: all of it, whatever `positions` are."""
        return Batch(self.images, self.labels, self.indices)


class StreamedSet(Dataset[Batch]):
    """Images that are read when they are needed, by `workers` processes of each rank.

    ``read_item(index, epoch)`` gives an image, uint8 [h, w] or [3, h, w], and its label; what it draws follows from its
    arguments. `indices` int64 [n] are those of the split as it is published. Batches come on the CPU.
    """

    def __init__(
        self, read_item: Callable[[int, int], tuple[Tensor, int]], indices: Tensor, shape: tuple[int, ...], workers: int
    ):
        self.read_item, self.indices, self.shape, self.workers = read_item, indices, shape, workers

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, share: Share) -> Batch:
        """A whole batch: what a `DataLoader` calls, in a worker where there are any."""
        indices = self.indices[share.positions]
        images = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        labels = torch.empty(len(indices), dtype=torch.int64)
        for row, index in enumerate(indices.tolist()):
            image, labels[row] = self.read_item(index, share.epoch)
            if image.shape != self.shape:
                raise ValueError(f"the image of item {index} has shape {tuple(image.shape)}, others {self.shape}")
            images[row] = image
        return Batch(images, labels, indices)

    def read(self, positions: Tensor) -> Batch:
        """The images at `positions`, int64 [n], as in epoch 0."""
        return self.__getitems__(Share(positions.cpu()))

    def subset(self, positions: Tensor) -> StreamedSet:
        return StreamedSet(self.read_item, self.indices[positions], self.shape, self.workers)

    def to(self, device: torch.device) -> StreamedSet:
        return self

    def sample(self, positions: Tensor) -> Batch:
        """What stands for the whole: the images at `positions` and all indices."""
        images, labels, _ = self.read(positions)
        return Batch(images, labels, self.indices)


AnySet = ImageSet | StreamedSet


@dataclass(frozen=True)
class Splits:
    """The training images, the training images held out for choosing, and the test images of a data set."""

    train: AnySet
    validation: AnySet
    test: AnySet
    info: DataSetInfo

    def to(self, device: torch.device) -> Splits:
        return Splits(self.train.to(device), self.validation.to(device), self.test.to(device), self.info)

    @cached_property
    def sha256(self) -> str:
        """Over images, labels and indices, of streamed images over a sample: two hosts with the same hash train on the same
        data."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return weights_sha256(
            {
                f"{name}.{field}": tensor
                for name, part in parts.items()
                for field, tensor in part.sample(spread(len(part), HASHED))._asdict().items()
            }
        )


HASHED = 32  # streamed images of a split that its hash is over


def spread(count: int, most: int) -> Tensor:
    """At most `most` positions, evenly spread over 0..count-1: int64 [n]."""
    return torch.arange(count) if count <= most else torch.arange(most) * count // most
