"""Data sets as users bring them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from digitdist.config import load_config
from digitdist.data import Splits, load_splits


class Blocks(Dataset):
    """Small colour pictures of one of three kinds, the same each time, in torchvision's convention."""

    classes = ("left", "middle", "right")

    def __init__(self, root: str, train: bool = True, count: int = 120):
        self.count, self.first = count if train else count // 3, 0 if train else 10**6
        self.transform = lambda pixels: Image.fromarray(pixels)  # which cannot be pickled

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = np.random.RandomState(self.first + index).randint(0, 120, (32, 30, 3)).astype(np.uint8)
        label = index % 3
        pixels[:, 10 * label : 10 * label + 10] += 100
        return self.transform(pixels), label


class Jittered(Blocks):
    """Its items differ each time: they draw from Python's, numpy's and torch's generators."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        picture, label = super().__getitem__(index)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
        drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
        return (pixels * 0.8 + 0.2 * torch.tensor(drawn)[:, None, None]).float(), torch.tensor(label)


class BySplit(Dataset):
    """It takes `split`, has no class names, and gives arrays."""

    def __init__(self, split: str):
        self.split, self.targets = split, [index % 4 for index in range(40)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((8, 8), 60 * self.targets[index] + (self.split == "test"), np.uint8), self.targets[index]


class Plain(BySplit):
    """It has no splits."""

    def __init__(self) -> None:
        super().__init__("train")


class Uneven(BySplit):
    """Two of its items have another shape, and one raises."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index == 17:
            raise OSError("the disk has gone")
        return (np.zeros((9, 8), np.uint8), 0) if index in (5, 30) else super().__getitem__(index)


class Normalised(BySplit):
    """Its pixels are normalised already."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 8, 8), -1.5), 0


class FewDigits(Dataset):
    """The first images of MNIST."""

    classes = tuple("0123456789")

    def __init__(self, root: str, train: bool = True, count: int = 610):
        splits = load_splits(load_config((), [f"data.root={root}"]).data, 0)
        self.images, self.labels, _ = (splits.train if train else splits.test).read(torch.arange(count if train else 200))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])


def write_folder(root: Path, splits: Splits, train: int = 160, test: int = 40) -> Path:
    """MNIST's first images as a folder of pictures, ``ROOT/SPLIT/CLASS/*.png``."""
    for split, images, count in (("train", splits.train, train), ("test", splits.test, test)):
        for index in range(count):
            folder = root / split / f"digit {int(images.labels[index])}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.images[index].numpy()).save(folder / f"{index:05}.png")
    return root
