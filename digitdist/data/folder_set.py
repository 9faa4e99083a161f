"""A folder of pictures in torchvision's `ImageFolder` layout: ``ROOT/train/CLASS/*`` and ``ROOT/test/CLASS/*``."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from digitdist.config import shown
from digitdist.data.forms import picture_form
from digitdist.data.info import DataSetInfo
from digitdist.data.picture import SUFFIXES, open_picture, read_picture
from digitdist.errors import UserError


@dataclass(frozen=True)
class FolderItems:
    """The pictures of a split, sorted by class and path; `stamps` are their sizes and times of change."""

    folder: Path
    names: list[str]
    labels: list[int]
    stamps: list[tuple[int, int]]
    info: DataSetInfo

    def __len__(self) -> int:
        return len(self.names)

    def __call__(self, index: int, epoch: int) -> tuple[Tensor, int]:
        """The image, uint8 [h, w] or [3, h, w], and the label at `index`.

        Raises:
            UserError: the file is not a picture, or holds no digit that could be cut out.
        """
        path = str(self.folder / self.names[index])
        try:
            return picture_form(open_picture(read_picture(path)), self.info), self.labels[index]
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def sha256(self) -> str:
        """Over what the images are made from: names, sizes and times of the files, classes, and the form of an image."""
        names = "\0".join([str(self.folder.resolve()), self.info.to_json(), *self.names])
        digest = hashlib.sha256(names.encode(errors="surrogateescape"))  # a file's name may be any bytes
        digest.update(np.array([self.labels, *zip(*self.stamps, strict=True)], dtype=np.int64).tobytes())
        return digest.hexdigest()


def folder_classes(root: Path) -> tuple[str, ...]:
    """The class names: those of the folders in ``ROOT/train``, sorted.

    Raises:
        UserError: there are none.
    """
    classes = tuple(sorted(entry.name for entry in _entries(root / "train") if entry.is_dir()))
    if not classes:
        raise UserError(f"{root / 'train'} has no folders; put each class's pictures into {root / 'train' / 'CLASS'}")
    return classes


def open_folder(root: Path, split: str, info: DataSetInfo) -> FolderItems:
    """The pictures of ``ROOT/SPLIT``.

    Raises:
        UserError: a folder is missing, holds no picture, or is none of the classes.
    """
    found: list[tuple[str, int, tuple[int, int]]] = []
    folders = [entry for entry in _entries(root / split) if entry.is_dir()]
    unknown = sorted({entry.name for entry in folders} - set(info.classes))
    if unknown:
        raise UserError(f"{root / split}: no class in {root / 'train'} has the name of {', '.join(unknown)}")
    for entry in sorted(folders, key=lambda entry: entry.name):
        pictures = sorted(_pictures(entry.path, entry.name))
        if not pictures and split == "train":
            raise UserError(f"{entry.path} has no picture ({', '.join(sorted(SUFFIXES))})")
        found += [(name, info.classes.index(entry.name), stamp) for name, stamp in pictures]
    if not found:
        raise UserError(f"{root / split} has no pictures; put them into {root / split / 'CLASS'}")
    names, labels, stamps = (list(column) for column in zip(*found, strict=True))
    return FolderItems(root / split, names, labels, stamps, info)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, without hidden entries."""
    try:
        return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; data.name=folder needs data.root=DIR with DIR/train/CLASS/* and DIR/test/CLASS/*"
        ) from None


def _pictures(folder: str, name: str) -> list[tuple[str, tuple[int, int]]]:
    """Name below the split and stamp of each picture in `folder` and the folders in it."""
    found = []
    for entry in _entries(Path(folder)):
        below = f"{name}/{entry.name}"
        try:
            if entry.is_dir():
                found += _pictures(entry.path, below)
            elif f".{entry.name.rpartition('.')[2].lower()}" in SUFFIXES:
                if not entry.is_file():
                    raise UserError(f"{entry.path} is not a file, or a link to nowhere; remove it, or put a picture there")
                status = entry.stat()
                found.append((below, (status.st_size, status.st_mtime_ns)))
        except OSError as error:  # as where links lead in a circle
            raise UserError(f"{shown(entry.path)}: {error.strerror}; remove it") from None
    return found
