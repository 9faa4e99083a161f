"""Files: written whole or not at all, and read only where they are plain files of a size that one expects."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any

MIB = 1 << 20
TEMPORARY = f".{16 * '[0-9a-f]'}.tmp"  # what `atomic_write` leaves where it is killed, as a pattern


def atomic_write(file: Path, content: bytes | bytearray) -> None:
    """Replaces `file` by `content`, which is on the disk when this returns; whatever happens meanwhile, `file` holds all of the
    old or all of the new content, also where several write it at once.

    Raises:
        OSError: it cannot be written; nothing is left of the attempt.
    """
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")  # a name that nobody can have linked to another file
    try:
        write_synced(temporary, content)
        os.replace(temporary, file)
        sync(file.parent)
    except BaseException:  # ^C too
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_synced(path: Path, data: bytes | bytearray) -> None:
    """Writes a new file and waits until it is on the disk.

    Raises:
        OSError: it exists already, or cannot be written.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk.

    Raises:
        OSError: it is not there, or the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_plain(file: Path, at_most: int = 16 * MIB) -> bytes:
    """The content of a regular file of at most so many bytes. No link is followed, and no pipe is waited for.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(file, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link", str(file)) from None
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > at_most:
        os.close(descriptor)
        is_plain = stat.S_ISREG(status.st_mode)
        wrong = f"is larger than {at_most:,} bytes" if is_plain else "is not a regular file"
        raise OSError(errno.EFBIG if is_plain else errno.EINVAL, wrong, str(file))
    with open(descriptor, "rb") as opened:
        return opened.read(at_most)


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or one that is nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder, if it is there.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
