"""Data sets as uint8 tensors in memory, cut into training, held-out and test images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from digitdist.checkpoint import weights_sha256


@dataclass(frozen=True)
class DataSetInfo:
    """torchvision's class of a data set, its class names, mean and deviation of a training pixel / 255."""

    torchvision_class: str
    mean: float
    std: float
    classes: tuple[str, ...] = tuple("0123456789")


FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")

DATA_SETS = {
    "mnist": DataSetInfo("MNIST", 0.1307, 0.3081),
    "fashion_mnist": DataSetInfo("FashionMNIST", 0.2860, 0.3530, FASHION),
    "kmnist": DataSetInfo("KMNIST", 0.1918, 0.3483, KUZUSHIJI),
    "qmnist": DataSetInfo("QMNIST", 0.1307, 0.3081),
    "emnist_digits": DataSetInfo("EMNIST", 0.1722, 0.3309),
    "usps": DataSetInfo("USPS", 0.1380, 0.2580),
}


class Share(NamedTuple):
    """One rank's images of a global batch: positions in a data set, int64 [n], on its device; n may be 0.

    A tuple, since Accelerate takes an empty tensor for a batch that is not there.
    """

    positions: Tensor


class Batch(NamedTuple):
    """Images uint8 [n, 28, 28], labels int64 [n], and the images' indices int64 [n]."""

    images: Tensor
    labels: Tensor
    indices: Tensor

    def span(self, span: slice) -> Batch:
        return Batch(self.images[span], self.labels[span], self.indices[span])


class ImageSet(Dataset[Batch]):
    """Labelled images in memory: `images` uint8 [n, 28, 28], `labels` int64 [n], `indices` int64 [n].

    An index is an image's position in the split as it is published, so that it names one image for good.
    """

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

    def subset(self, positions: Tensor) -> ImageSet:
        return ImageSet(*self.__getitems__(Share(positions)))

    def to(self, device: torch.device) -> ImageSet:
        """The same images on `device`."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.indices.to(device))


@dataclass(frozen=True)
class Splits:
    """The training images, the training images held out for choosing, and the test images."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def to(self, device: torch.device) -> Splits:
        return Splits(self.train.to(device), self.validation.to(device), self.test.to(device))

    def sha256(self) -> str:
        """Over all images, labels and indices: two hosts with the same hash train on the same data."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return weights_sha256(
            {f"{name}.{field}": tensor for name, part in parts.items() for field, tensor in vars(part).items()}
        )
