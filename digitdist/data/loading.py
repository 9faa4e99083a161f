"""Loads the configured data set and holds images out."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digitdist.config import DataConfig
from digitdist.data.cache import cached
from digitdist.data.datasets import AnySet, ImageSet, Splits, StreamedSet, spread
from digitdist.data.folder_set import folder_classes, open_folder
from digitdist.data.info import DATA_SETS, DataSetInfo
from digitdist.data.packaged_mnist import read_mnist
from digitdist.data.randomness import permutation
from digitdist.data.reading import read_all
from digitdist.data.torchvision_sets import read_torchvision
from digitdist.data.user_set import UserItems, open_user_set
from digitdist.distributed import cpu_quota, num_cores
from digitdist.errors import UserError, in_one_line
from digitdist.world import is_main, read_world

SAMPLE = 2000  # training images that mean and deviation are taken over
IN_MEMORY_BYTES = 2**30  # of a split that is read into memory unless data.in_memory says otherwise
MAX_WORKERS = 4


def known_info(config: DataConfig) -> DataSetInfo | None:
    """What is known of the configured data set before it is read: nothing of a folder and of a user's own."""
    return DATA_SETS.get(config.name) if config.target is None else None


def held_out_seed(config: DataConfig, seed: int) -> int:
    """The seed by which the held-out images of a run with this `seed` are chosen."""
    return seed if config.validation_seed is None else config.validation_seed


def load_splits(config: DataConfig, seed: int) -> Splits:
    """The configured data set; every process may call it at any time, without a process group.

    Raises:
        UserError: the data cannot be read or downloaded, or `data.validation` leaves nothing to train on.
    """
    info = known_info(config)
    if info:
        if config.in_memory is False:
            raise UserError(f"data.in_memory=false is not allowed with data.name={config.name}, which is small; set it to null")
        read: Any = read_mnist if config.name == "mnist" else lambda *where: read_torchvision(config.name, *where)
        train, test = (read(Path(config.root), split) for split in ("train", "test"))
    elif config.target is None:
        train, test, info = _load_folder(config)
    else:
        train, test, info = _load_user_set(config, seed)
    if config.validation >= len(train):
        raise UserError(
            f"data.validation={config.validation} leaves no image to train on; {info.name} takes at most {len(train) - 1}"
        )
    order = permutation(len(train), held_out_seed(config, seed), "validation")
    held_out, rest = order[: config.validation].sort().values, order[config.validation :].sort().values
    return Splits(train.subset(rest) if config.validation else train, train.subset(held_out), test, info)


def _load_folder(config: DataConfig) -> tuple[AnySet, AnySet, DataSetInfo]:
    """The pictures in `data.root`, decoded once and then kept in a cache."""
    root, form = Path(config.root), (config.size, config.size, config.image)
    plain = DataSetInfo(root.resolve().name, (0.0,) * config.channels, (1.0,) * config.channels, folder_classes(root), *form)
    sets, mistakes = [], list[str]()
    for split in ("train", "test"):
        items = open_folder(root, split, plain)
        name = f"{split}-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}"

        def make(items: Any = items, split: str = split) -> dict[str, Tensor]:
            images, labels = read_all(items, len(items), plain.raw_shape, plain.num_classes, _workers(config), split)
            return {"images": images, "labels": labels}

        try:
            kept = cached(name, items.sha256(), make)
        except UserError as error:
            mistakes += error.mistakes
            continue
        images: AnySet = ImageSet(kept["images"], kept["labels"])
        if config.in_memory is False:
            images = StreamedSet(items, torch.arange(len(items)), plain.raw_shape, _workers(config))
        sets.append(images)
    if mistakes:
        raise UserError(*mistakes)
    return sets[0], sets[1], _measured(plain.name, sets[0], plain.classes, config.image)


def _load_user_set(config: DataConfig, seed: int) -> tuple[AnySet, AnySet, DataSetInfo]:
    """The data set of `data.target`: in memory where it is small and gives the same items each time, else streamed."""
    opened = {split: open_user_set(config, seed, split) for split in ("train", "test")}
    shape = _first_shape(config, opened["train"])
    sets: dict[str, AnySet] = {}
    mistakes: list[str] = []
    for split, items in opened.items():
        in_memory = config.in_memory if config.in_memory is not None else _is_small_and_fixed(items)
        if in_memory:
            try:
                sets[split] = ImageSet(*read_all(items, len(items), shape, None, _workers(config), split, shown=is_main()))
            except UserError as error:
                mistakes += [f"data.target={config.target}, {split}: {mistake}" for mistake in error.mistakes]
        else:
            sets[split] = StreamedSet(items, torch.arange(len(items)), shape, _workers(config))
    if mistakes:
        raise UserError(*mistakes)
    classes = _class_names(config, opened["train"], sets)
    for images in sets.values():
        if isinstance(images, ImageSet) and int(images.labels.max()) >= len(classes):
            raise UserError(
                f"data.target={config.target}: label {int(images.labels.max())} is not one of {len(classes)} classes"
            )
    return sets["train"], sets["test"], _measured(str(config.target), sets["train"], classes, "resize")


def _first_shape(config: DataConfig, items: UserItems) -> tuple[int, ...]:
    try:
        return tuple(items(0, 0)[0].shape)
    except Exception as error:  # a user's data set may raise anything
        raise UserError(f"data.target={config.target}: item 0 cannot be used: {in_one_line(error)}") from error


def _is_small_and_fixed(items: UserItems) -> bool:
    """Whether a split fits into memory and a few of its items are the same in two epochs."""
    try:
        pairs = [(items(index, 0)[0], items(index, 1)[0]) for index in spread(len(items), 8).tolist()]
    except Exception:  # whatever it is, reading all items will name this one with all others
        return True
    return len(items) * pairs[0][0].numel() <= IN_MEMORY_BYTES and all(torch.equal(*pair) for pair in pairs)


def _class_names(config: DataConfig, items: UserItems, sets: dict[str, Any]) -> tuple[str, ...]:
    """The class names that a user's data set tells as `classes`, else one number for each label."""
    names = getattr(items.data_set, "classes", None)
    if names is not None:
        return tuple(map(str, names))
    labels = [images.labels for images in sets.values() if isinstance(images, ImageSet)]
    if isinstance(sets["train"], StreamedSet):
        told = getattr(items.data_set, "targets", getattr(items.data_set, "labels", None))
        if told is None:
            raise UserError(f"data.target={config.target}: a data set that is streamed needs an attribute classes or targets")
        labels.append(torch.as_tensor(told).long())
    return tuple(str(number) for number in range(1 + max(int(part.max()) for part in labels)))


def _measured(name: str, train: AnySet, classes: tuple[str, ...], image: Any) -> DataSetInfo:
    """A data set's form, with mean and deviation of each channel over a fixed sample of its training images.

    Raises:
        UserError: there is only one class.
    """
    if len(classes) < 2:
        raise UserError(f"{name} has only the class {', '.join(classes)}; it takes at least two")
    images = train.read(spread(len(train), SAMPLE)).images
    channels = images.double().div(255) if images.ndim == 4 else images[:, None].double().div(255)
    mean, std = channels.mean((0, 2, 3)), channels.std((0, 2, 3), correction=0).clamp(min=1 / 255)
    rounded = [tuple(round(value, 4) for value in column.tolist()) for column in (mean, std)]
    height, width = images.shape[-2:]
    return DataSetInfo(name, rounded[0], rounded[1], classes, height, width, image)


def _workers(config: DataConfig) -> int:
    """Worker processes of this rank for a data set that is read item by item."""
    if config.workers is not None:
        return config.workers
    return min(MAX_WORKERS, max(1, num_cores(cpu_quota()) // read_world().local_size))
