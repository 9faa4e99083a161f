"""Decoded images on disk, by what they were made from."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
from filelock import FileLock
from torch import Tensor

from digitdist.checkpoint import Tensors, weights_sha256
from digitdist.files import TEMPORARY, atomic_write
from digitdist.world import print_main

STALE_S = 3600.0  # after which nobody writes a file any more
VERSION = 1  # of how pictures are brought to their form: a new one makes all caches anew


def cache_folder() -> Path:
    """Where decoded images are kept: ``digitdist`` in XDG_CACHE_HOME or ``~/.cache``; for a user without a home, in the
    folder for temporary files."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "digitdist"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"digitdist-{os.getuid()}"


def cached(name: str, key: str, make: Callable[[], Tensors]) -> Tensors:
    """What `make` gives, made once for all processes of a host: kept under `name` as long as `key` is the same.

    `key` is a hash of all that the tensors are made from. Where the cache cannot be written, they are made in each process.
    """
    file = cache_folder() / f"{name}.safetensors"
    label = f"{VERSION} {key}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            kept = _read(file, label)
            if kept is not None:
                return kept
            made = make()
            _remove_stale(file.parent)
            atomic_write(file, safetensors.torch.save(made, {"key": label, "sha256": weights_sha256(made)}))
            return made
    except OSError as error:
        print_main(f"decoded images cannot be kept in {file.parent} ({error.strerror}), and are made anew each time")
        return make()


def _remove_stale(folder: Path) -> None:
    """Removes what processes that were killed have left, maybe since the disk is full."""
    for stale in folder.glob(TEMPORARY):
        if time.time() - stale.lstat().st_mtime > STALE_S:
            stale.unlink(missing_ok=True)


def _read(file: Path, label: str) -> dict[str, Tensor] | None:
    """The tensors of `file`, or None where it is missing, made from something else, or damaged."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("key") != label:
                return None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (FileNotFoundError, safetensors.SafetensorError):
        return None
    return tensors if weights_sha256(tensors) == metadata.get("sha256") else None
