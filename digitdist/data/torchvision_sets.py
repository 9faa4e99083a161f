"""Data sets that torchvision downloads, brought to MNIST's form."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch.nn import functional as F

from digitdist.data.datasets import DATA_SETS, ImageSet
from digitdist.errors import UserError, in_one_line


def read_torchvision(name: str, root: Path, split: str) -> ImageSet:
    """The ``train`` or ``test`` images of a data set, downloaded by the first process of a host.

    Raises:
        UserError: it cannot be downloaded; the message names the files and the folder to put them into.
    """
    import torchvision  # takes 2 s, so only here

    kind = getattr(torchvision.datasets, DATA_SETS[name].torchvision_class)
    options: dict[str, Any] = {"train": split == "train"} | ({"split": "digits"} if name == "emnist_digits" else {})
    folder = root / "USPS" if name == "usps" else root
    output = io.StringIO()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".digitdist.lock"), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            data = kind(str(folder), download=True, **options)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, EOFError, zipfile.BadZipFile) as error:
        addresses, files, where = _sources(kind, folder)
        raise UserError(
            f"data.name={name} cannot be downloaded ({in_one_line(error)}); tried {', '.join(addresses)};"
            f" put {', '.join(files)} into {where}"
        ) from None
    return _as_images(name, data)


def _as_images(name: str, data: Any) -> ImageSet:
    images, labels = torch.as_tensor(np.asarray(data.data)), torch.as_tensor(data.targets).long()
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
        case "QMNIST":
            addresses = [address for part in ("train", "test") for address, _ in kind.resources[part]]
            return addresses, [address.rpartition("/")[2] for address in addresses], folder
    files = [name for name, _ in kind.resources]
    return [mirror + name for mirror in kind.mirrors for name in files], files, folder
