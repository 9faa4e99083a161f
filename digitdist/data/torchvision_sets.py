"""Data sets that torchvision downloads, brought to MNIST's form."""

from __future__ import annotations

import contextlib
import errno
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch.nn import functional as F

from digitdist.data.datasets import ImageSet
from digitdist.errors import UserError, in_one_line

CLASSES = {
    "fashion_mnist": "FashionMNIST",
    "kmnist": "KMNIST",
    "qmnist": "QMNIST",
    "emnist_digits": "EMNIST",
    "usps": "USPS",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
}


def read_torchvision(name: str, root: Path, split: str) -> ImageSet:
    """The ``train`` or ``test`` images of a data set, downloaded by the first process of a host.

    Raises:
        UserError: it cannot be downloaded; the message names the files and the folder to put them into.
    """
    import torchvision  # takes 2 s, so only here

    kind = getattr(torchvision.datasets, CLASSES[name])
    options: dict[str, Any] = {"split": split} if name == "svhn" else {"train": split == "train"}
    options |= {"split": "digits"} if name == "emnist_digits" else {}
    folder = root / kind.__name__ if name in ("usps", "svhn") else root
    output, before = io.StringIO(), {*folder.rglob("*")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".digitdist.lock"), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            data = kind(str(folder), download=True, **options)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            for made in {*folder.rglob("*")} - before:  # half a file would keep the disk full
                if made.is_file():
                    made.unlink()
        addresses, files, where = _sources(kind, folder)
        raise UserError(
            f"data.name={name} cannot be downloaded ({in_one_line(error)}); tried {', '.join(addresses)};"
            f" put {', '.join(files)} into {where}"
        ) from None
    return _as_images(name, data)


def _as_images(name: str, data: Any) -> ImageSet:
    images = torch.as_tensor(np.asarray(data.data))
    labels = torch.as_tensor(data.labels if name == "svhn" else data.targets).long()
    if name == "cifar10":
        images = images.permute(0, 3, 1, 2).contiguous()
    if name == "qmnist":
        labels = labels[:, 0].contiguous()  # the class; the other columns say who wrote it and where
    if name == "emnist_digits":
        images = images.transpose(1, 2).contiguous()  # EMNIST is published transposed
    if name == "usps":
        # 16×16 there; MNIST's digits fill a 20×20 box in the middle of 28×28.
        images = F.pad(F.interpolate(images.unsqueeze(1).float(), size=(20, 20), mode="bilinear"), (4, 4, 4, 4))
        images = images.squeeze(1).round().to(torch.uint8)
    return ImageSet(images, labels)


def _sources(kind: Any, root: Path) -> tuple[list[str], list[str], Path]:
    """The addresses that torchvision tries for a data set, the files it wants, and the folder where it looks for them."""
    folder = root / kind.__name__ / "raw"
    match kind.__name__:
        case "USPS":
            return [part[0] for part in kind.split_list.values()], [part[1] for part in kind.split_list.values()], root
        case "EMNIST":
            return [kind.url], [kind.url.rpartition("/")[2]], folder
        case "SVHN":
            parts = [kind.split_list[split] for split in ("train", "test")]
            return [part[0] for part in parts], [part[1] for part in parts], root
        case "CIFAR10":
            return [kind.url], [kind.filename], root
        case "QMNIST":
            addresses = [address for part in ("train", "test") for address, _ in kind.resources[part]]
            return addresses, [address.rpartition("/")[2] for address in addresses], folder
    files = [name for name, _ in kind.resources]
    return [mirror + name for mirror in kind.mirrors for name in files], files, folder
