"""Reading all items of a data set into memory, once, by worker processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from digitdist.data.workers import loader_options
from digitdist.errors import UserError, in_one_line

CHUNK = 128  # items that a worker reads at once
FEW = 1000  # items for which no process is started

ReadItem = Callable[[int, int], tuple[Tensor, int]]


class _Chunks(Dataset[tuple[Tensor, Tensor, list[str]]]):
    """Images and labels of a chunk of indices, and what is wrong with those that cannot be read."""

    def __init__(self, read_item: ReadItem, shape: tuple[int, ...], num_classes: int | None):
        self.read_item, self.shape, self.num_classes = read_item, shape, num_classes

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor, list[str]]:
        images, labels, mistakes = [], [], []
        for index in indices:
            try:
                image, label = self.read_item(index, 0)
                check_item(image, label, self.shape, self.num_classes)
                images.append(image)
                labels.append(label)
            except UserError as error:
                mistakes.append(str(error))
            except Exception as error:  # a user's data set may raise anything
                mistakes.append(f"item {index}: {in_one_line(error)}")
        stacked = torch.stack(images) if images else torch.empty(0, *self.shape, dtype=torch.uint8)
        return stacked, torch.tensor(labels, dtype=torch.int64), mistakes


def check_item(image: Tensor, label: int, shape: tuple[int, ...], num_classes: int | None) -> None:
    """Refuses an item that is not of the data set's form; `num_classes` may not be known yet.

    Raises:
        ValueError: its image has another shape, or its label is no class.
    """
    if image.shape != shape:
        raise ValueError(f"its image has shape {tuple(image.shape)}, others {tuple(shape)}; resize them to one shape")
    if label < 0 or (num_classes is not None and label >= num_classes):
        raise ValueError(f"its label {label} is not in 0..{'' if num_classes is None else num_classes - 1}")


def read_all(
    read_item: ReadItem,
    count: int,
    shape: tuple[int, ...],
    num_classes: int | None,
    workers: int,
    title: str,
    shown: bool = True,
) -> tuple[Tensor, Tensor]:
    """All images, uint8 [count, *shape], and labels, int64 [count]; a progress bar is `shown` on a terminal.

    Raises:
        UserError: with each item that cannot be read.
    """
    loader = DataLoader(
        _Chunks(read_item, shape, num_classes),
        batch_sampler=[list(range(first, min(first + CHUNK, count))) for first in range(0, count, CHUNK)],
        **loader_options(0 if count <= FEW else workers),
    )
    images, labels, mistakes = torch.empty(count, *shape, dtype=torch.uint8), torch.empty(count, dtype=torch.int64), []
    position = 0
    with tqdm(total=count, desc=title, unit=" images", disable=None if shown else True, leave=False) as bar:
        for some, their_labels, wrong in loader:
            mistakes += wrong
            images[position : position + len(some)], labels[position : position + len(some)] = some, their_labels
            position += len(some)
            bar.update(len(some) + len(wrong))
    if mistakes:
        raise UserError(*mistakes)
    return images, labels
