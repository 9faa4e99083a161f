"""Checkpoints: plain tensors and JSON to a folder and back; atomic, verified, the newest good one first.

A checkpoint is a folder ``step-000000600`` of ``NAME.safetensors`` files, ``state.json`` and, written last,
``manifest.json`` with the size and SHA-256 of each file. It is written under a temporary name in the same folder, flushed
to the disk, and renamed: a folder of the final name is complete, or somebody has damaged it, which the manifest shows.
Nothing here unpickles, and nothing here knows of ranks: one process writes, and any process may read.

    python -m digitdist.checkpoint verify RUN
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch
from torch import Tensor

from digitdist.config import Parser
from digitdist.errors import EXIT_USER_ERROR, UserError, in_one_line
from digitdist.files import MIB, parse_json, read_plain, remove, sync, write_synced

MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step-[0-9]{9,}")
LISTINGS = 3  # of a folder whose checkpoints are being removed meanwhile
LARGEST_MANIFEST = MIB
NOT_AS_WRITTEN = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.ENXIO)
Tensors = dict[str, Tensor]


class DamagedCheckpoint(Exception):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


class UnreadableCheckpoint(DamagedCheckpoint):
    """One that cannot be read at this moment; it may be good."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: groups of named tensors (model, optimizer, ema, …), and plain JSON values."""

    tensors: dict[str, Tensors]
    state: dict[str, Any]
    folder: Path | None = None

    @property
    def step(self) -> int:
        return int(self.state["step"])


def folder_name(step: int) -> str:
    return f"step-{step:09d}"


def step_of(folder: Path) -> int:
    """The step of a folder that has a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, shape, dtype and bytes of each parameter and buffer, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(
    parent: Path,
    checkpoint: Checkpoint,
    keep: int,
    best: str | None = None,
    on_file: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = print,
) -> Path:
    """Writes one checkpoint into `parent`, verifies it, and then removes older ones; see `prune`.

    `on_file` is called after each file; `report` gets a line where older ones cannot be removed. A failure leaves the older
    checkpoints as they were.

    Raises:
        OSError: the disk is full, or writing fails.
        DamagedCheckpoint: what was read back is not what was written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / folder_name(checkpoint.step)
    for stale in parent.glob(".step-*.tmp"):  # left by a process that died while it wrote
        remove(stale)
    if is_good(final):  # the same step of the same run, repeated after a restart, has the same content
        return final
    temporary = parent / f".{final.name}.tmp"
    try:
        temporary.mkdir()
        sums = {}
        for name, data in _files(checkpoint):
            write_synced(temporary / name, data)
            sums[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            on_file()
        write_synced(temporary / MANIFEST, json.dumps({"files": sums}, indent=1).encode())
        sync(temporary)
        verify(temporary)
        remove(final)
        os.replace(temporary, final)
        sync(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        prune(parent, keep, best)
    except OSError as error:
        report(f"older checkpoints cannot be removed: {error}")
    return final


def prune(parent: Path, keep: int, best: str | None = None) -> None:
    """Removes the checkpoints that are older than the last `keep` good ones, but for the one named `best`.

    So one that is damaged, or cannot be read at this moment, goes by its age alone.

    Raises:
        OSError: one cannot be removed.
    """
    good = [folder for folder in folders(parent) if is_good(folder)]
    if len(good) < keep:
        return
    for folder in folders(parent):
        if step_of(folder) < step_of(good[-keep]) and folder.name != best:
            remove(folder)  # which may be a file or a link


def folders(parent: Path) -> list[Path]:
    """All checkpoints in `parent`, oldest first, damaged ones too; what has any other name is not ours.

    Raises:
        UnreadableCheckpoint: `parent` cannot be read.
    """
    try:
        return sorted((parent / name for name in os.listdir(parent) if NAME.fullmatch(name)), key=step_of)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UnreadableCheckpoint(f"{parent}: {error.strerror}") from None


def verify(folder: Path) -> None:
    """Compares every file of the manifest with what it says; other files in the folder do not matter.

    Raises:
        DamagedCheckpoint: a file is missing, a link, outside the folder, or not as it was written; or it cannot be read.
    """
    _read_verified(folder)


def is_good(folder: Path) -> bool:
    """Whether `verify` finds nothing wrong."""
    try:
        verify(folder)
    except DamagedCheckpoint:
        return False
    return True


def read(folder: Path) -> Checkpoint:
    """Reads one checkpoint; its tensors are on the CPU.

    Raises:
        DamagedCheckpoint: it is not complete, or cannot be read; nothing of it has been used.
    """
    files = _read_verified(folder)
    try:
        state = parse_json(files.pop(STATE))
        tensors = {name.removesuffix(".safetensors"): safetensors.torch.load(data) for name, data in files.items()}
    except Exception as error:  # safetensors raises anything where somebody has made a sum for what is none
        raise DamagedCheckpoint(f"{folder}: not a checkpoint of this program ({in_one_line(error)})") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0 or "model" not in tensors:
        raise DamagedCheckpoint(f"{folder}: not a checkpoint of this program (it has no step, or no model)")
    return Checkpoint(tensors, state, folder)


def newest_good(parent: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint in `parent`; `report` gets a line about each newer one that is not good.

    Raises:
        UnreadableCheckpoint: none is good, and one cannot be read at this moment, so that it may be good.
    """
    unreadable: list[UnreadableCheckpoint] = []
    for _ in range(LISTINGS):
        are_there = True
        for folder in reversed(folders(parent)):
            try:
                return read(folder)
            except DamagedCheckpoint as damage:
                if os.path.lexists(folder):
                    report(f"skipped a checkpoint: {damage}")
                    unreadable += [damage] if isinstance(damage, UnreadableCheckpoint) else []
                else:
                    are_there = False  # a training that goes on has removed it, and written a newer one before
        if are_there:
            break
    if unreadable:
        raise unreadable[0]
    return None


def _files(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    for name, tensors in checkpoint.tensors.items():
        # Clones, since safetensors refuses tensors that share memory, as tied weights do.
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        yield f"{name}.safetensors", safetensors.torch.save(plain)
    yield STATE, json.dumps(checkpoint.state, indent=1).encode()


def _read_verified(folder: Path) -> dict[str, bytes]:
    """The content of each file of a checkpoint, read once and compared with the manifest."""
    if folder.is_symlink():
        raise DamagedCheckpoint(f"{folder}: is a link")
    try:
        files = parse_json(_read(folder / MANIFEST, LARGEST_MANIFEST))["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # of a size that is infinite
        raise DamagedCheckpoint(f"{folder}/{MANIFEST}: not a manifest") from None
    data = {}
    for name, (size, sha256) in expected.items():
        path = folder / name
        if path.name != name or not name.isprintable():
            raise DamagedCheckpoint(f"{folder}/{MANIFEST}: {name!r} is not a name in this folder")
        data[name] = _read(path, min(size, psutil.virtual_memory().available))
        if len(data[name]) != size:
            raise DamagedCheckpoint(f"{path}: {len(data[name])} bytes, {size} were written")
        if hashlib.sha256(data[name]).hexdigest() != sha256:
            raise DamagedCheckpoint(f"{path}: its SHA-256 is not that of what was written")
    if STATE not in data:
        raise DamagedCheckpoint(f"{folder}: {STATE} is missing")
    return data


def _read(path: Path, at_most: int) -> bytes:
    try:
        return read_plain(path, at_most)
    except OSError as error:
        kind = DamagedCheckpoint if error.errno in NOT_AS_WRITTEN else UnreadableCheckpoint
        raise kind(f"{path}: {error.strerror}") from None


def main() -> None:
    """The command."""
    parser = Parser(
        "python -m digitdist.checkpoint",
        "Compares each file of a run's checkpoints with its SHA-256 sum; exit code 1 if one is damaged.",
        "verify quick",
    )
    parser.add_argument("action", choices=["verify"])
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name in runs")
    arguments = parser.parse_args()
    parents = [run / "checkpoints" for run in (Path(os.path.expanduser(arguments.run)), Path("runs") / arguments.run)]
    parent = next((parent for parent in parents if parent.is_dir()), None)
    if parent is None:
        raise UserError(f"{arguments.run}: no run of that folder or name has checkpoints; give runs/NAME")
    num_damaged = 0
    for folder in folders(parent):
        try:
            verify(folder)
            print(f"{folder}: good")
        except DamagedCheckpoint as damage:
            num_damaged += 1
            print(f"damaged: {damage}")
    print(f"{len(folders(parent))} checkpoints, {num_damaged} damaged")
    sys.exit(1 if num_damaged else 0)


if __name__ == "__main__":
    try:
        try:
            main()
        finally:
            print(end="", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # whoever reads our output has seen enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # of the output: what cannot be read is told for each checkpoint
        print(f"error: what is printed cannot be written: {error.strerror}; make room, or print it elsewhere", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
