"""MNIST from the package: its four files, unpacked into ``data.root`` where they are missing or damaged."""

from __future__ import annotations

import hashlib
import lzma
from importlib import resources
from pathlib import Path

import torch
from filelock import FileLock

from digitdist.data.datasets import ImageSet
from digitdist.errors import UserError
from digitdist.files import TEMPORARY, atomic_write

WAY_OUT = "give a folder you can write to, with 55 MB of room"
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_mnist(root: Path | None, split: str) -> ImageSet:
    """The ``train`` or ``test`` images of MNIST; without a `root`, nothing is written.

    Raises:
        UserError: `root` cannot be written to or read.
    """
    sums = {name: sha256 for sha256, name in map(str.split, _packaged("SHA256SUMS").decode().splitlines())}
    if root:
        images, labels = (_unpacked(root / "MNIST" / "raw" / name, sums[name]) for name in FILES[split])
    else:
        images, labels = (_content(name, sums[name]) for name in FILES[split])
    pixels = torch.frombuffer(images, dtype=torch.uint8, offset=16).view(-1, 28, 28)
    return ImageSet(pixels, torch.frombuffer(labels, dtype=torch.uint8, offset=8).long())


def _unpacked(path: Path, sha256: str) -> bytearray:
    """The content of one file of MNIST, which is written or replaced where needed."""
    try:
        content = _verified(path, sha256)
        if content is not None:
            return content
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".digitdist.lock"):
            for stale in path.parent.glob(TEMPORARY):  # of a process that was killed, maybe since the disk is full
                stale.unlink(missing_ok=True)
            content = _verified(path, sha256)  # another process may have been faster
            return _unpack(path, sha256) if content is None else content
    except OSError as error:
        raise UserError(f"data.root: {error.filename or path}: {error.strerror}; {WAY_OUT}") from None


def _verified(path: Path, sha256: str) -> bytearray | None:
    """The content of `path`, or None where it is missing or another."""
    try:
        content = bytearray(path.read_bytes())
    except FileNotFoundError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def _unpack(path: Path, sha256: str) -> bytearray:
    if path.exists():
        print(f"{path} is not MNIST's file (its SHA-256 differs): replaced", flush=True)
    content = _content(path.name, sha256)
    atomic_write(path, content)
    return content


def _content(name: str, sha256: str) -> bytearray:
    content = bytearray(lzma.decompress(_packaged(f"{name}.xz")))
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"the package's own {name}.xz is damaged; install digitdist again")
    return content


def _packaged(name: str) -> bytes:
    return (resources.files("digitdist.data") / "mnist" / name).read_bytes()
