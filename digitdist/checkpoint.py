"""Checkpoints: plain tensors and JSON to a folder and back; atomic, verified, the newest good one first.

A checkpoint is a folder ``step-000000600`` of ``NAME.safetensors`` files, ``state.json`` and, written last,
``manifest.json`` with the size and SHA-256 of each file. It is written under a temporary name in the same folder, flushed
to the disk, and renamed: a folder of the final name is complete, or somebody has damaged it, which the manifest shows.
Nothing here unpickles, and nothing here knows of ranks: one process writes, and any process may read.

    python -m digitdist.checkpoint verify RUN
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from digitdist.config import Parser
from digitdist.errors import EXIT_USER_ERROR, UserError

MANIFEST = "manifest.json"
STATE = "state.json"
Tensors = dict[str, Tensor]


class DamagedCheckpoint(Exception):
    """A checkpoint that must not be used; the message names the file and what is wrong with it."""


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


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, shape, dtype and bytes of each parameter and buffer, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(
    parent: Path, checkpoint: Checkpoint, keep: int, best: str | None = None, on_file: Callable[[], None] = lambda: None
) -> Path:
    """Writes one checkpoint into `parent`, verifies it, and then removes all but the last `keep` and the one named `best`.

    `on_file` is called after each file. A failure leaves the older checkpoints as they were.

    Raises:
        OSError: the disk is full, or writing fails.
        DamagedCheckpoint: what was read back is not what was written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / folder_name(checkpoint.step)
    for stale in parent.glob(".step-*.tmp"):  # left by a process that died while it wrote
        shutil.rmtree(stale)
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
        _sync_folder(temporary)
        verify(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync_folder(parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(parent, keep, best)
    return final


def prune(parent: Path, keep: int, best: str | None = None) -> None:
    """Removes all but the last `keep` checkpoints that are good, and the one named `best`."""
    good = [folder for folder in folders(parent) if is_good(folder)]
    for folder in folders(parent):
        if folder not in good[-keep:] and folder.name != best:
            shutil.rmtree(folder)


def folders(parent: Path) -> list[Path]:
    """All checkpoints in `parent`, oldest first, damaged ones too."""
    return sorted(folder for folder in parent.glob("step-*") if folder.is_dir())


def verify(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        DamagedCheckpoint: a file is missing, superfluous, a link, outside the folder, or not as it was written.
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
        DamagedCheckpoint: it is not complete; nothing of it has been used.
    """
    files = _read_verified(folder)
    try:
        state = json.loads(files.pop(STATE))
        tensors = {name.removesuffix(".safetensors"): safetensors.torch.load(data) for name, data in files.items()}
        return Checkpoint(tensors, state, folder)
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise DamagedCheckpoint(f"{folder}: not a checkpoint of this program ({error})") from None


def newest_good(parent: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest good checkpoint in `parent`; `report` gets a line about each newer one that is damaged."""
    for folder in reversed(folders(parent)):
        try:
            return read(folder)
        except DamagedCheckpoint as damage:
            report(f"skipped a damaged checkpoint: {damage}")
    return None


def _files(checkpoint: Checkpoint) -> Iterator[tuple[str, bytes]]:
    for name, tensors in checkpoint.tensors.items():
        # Clones, since safetensors refuses tensors that share memory, as tied weights do.
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        yield f"{name}.safetensors", safetensors.torch.save(plain)
    yield STATE, json.dumps(checkpoint.state, indent=1).encode()


def _read_verified(folder: Path) -> dict[str, bytes]:
    """The content of each file of a checkpoint, read once and compared with the manifest."""
    try:
        manifest = folder / MANIFEST
        if folder.is_symlink() or manifest.is_symlink():
            raise DamagedCheckpoint(f"{folder}: is a link")
        files = json.loads(manifest.read_bytes())["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except OSError as error:
        raise DamagedCheckpoint(f"{folder}/{MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedCheckpoint(f"{folder}/{MANIFEST}: not a manifest") from None
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if found != expected.keys():
        missing, extra = sorted(expected.keys() - found), sorted(found - expected.keys())
        raise DamagedCheckpoint(
            f"{folder}: " + ", ".join([f"{name} is missing" for name in missing] + [f"{name} is extra" for name in extra])
        )
    data = {}
    for name, (size, sha256) in expected.items():  # names found in this folder, so none leads out of it
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise DamagedCheckpoint(f"{path}: not a plain file")
        data[name] = path.read_bytes()
        if len(data[name]) != size:
            raise DamagedCheckpoint(f"{path}: {len(data[name])} bytes, {size} were written")
        if hashlib.sha256(data[name]).hexdigest() != sha256:
            raise DamagedCheckpoint(f"{path}: its SHA-256 is not that of what was written")
    if STATE not in data:
        raise DamagedCheckpoint(f"{folder}: {STATE} is missing")
    return data


def atomic_write(file: Path, content: bytes | bytearray) -> None:
    """Replaces `file` by `content`; whatever happens meanwhile, it holds all of the old or all of the new content.

    Raises:
        OSError: it cannot be written; nothing is left of the attempt.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on the disk.

    Raises:
        OSError: it exists already, or cannot be written.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
