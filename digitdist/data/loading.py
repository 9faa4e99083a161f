"""Loads the configured data set and holds images out."""

from __future__ import annotations

from pathlib import Path

from digitdist.config import DataConfig
from digitdist.data.datasets import ImageSet, Splits
from digitdist.data.packaged_mnist import read_mnist
from digitdist.data.randomness import permutation
from digitdist.data.torchvision_sets import read_torchvision
from digitdist.errors import UserError


def load_splits(config: DataConfig, seed: int) -> Splits:
    """The configured data set; every process may call it at any time, without a process group.

    Raises:
        UserError: the data cannot be read or downloaded, or `data.validation` leaves nothing to train on.
    """
    train, test = _read(config, "train"), _read(config, "test")
    if config.validation >= len(train):
        raise UserError(
            f"data.validation={config.validation} leaves no image to train on; {config.name} takes at most {len(train) - 1}"
        )
    order = permutation(len(train), seed, "validation")
    held_out, rest = order[: config.validation].sort().values, order[config.validation :].sort().values
    return Splits(train.subset(rest) if config.validation else train, train.subset(held_out), test)


def _read(config: DataConfig, split: str) -> ImageSet:
    if config.name == "mnist":
        return read_mnist(Path(config.root), split)
    return read_torchvision(config.name, Path(config.root), split)
