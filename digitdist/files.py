"""Reading files that somebody else may have made: regular ones alone, of bounded size, through no link."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

MIB = 2**20
PART = 16 * MIB


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Its name is no link, and nothing is waited for: a FIFO, a socket or a device in its place is refused without a look into it.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it is something else than a file, longer, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link, and not followed", str(path)) from None
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):  # a socket, or a device that is not there
            raise OSError(errno.EINVAL, "it is not a regular file", str(path)) from None
        raise
    content = bytearray()
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        while status.st_size <= limit >= len(content) and (part := os.read(descriptor, min(PART, limit + 1 - len(content)))):
            content += part  # also where it grows while it is read
    finally:
        os.close(descriptor)
    if max(status.st_size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", str(path))
    return bytes(content)


def read_json(path: Path, limit: int) -> Any:
    """The JSON value in such a file.

    Raises:
        OSError: as `read_file`.
        ValueError: it is not JSON in UTF-8, or nested too deep.
    """
    try:
        return json.loads(read_file(path, limit))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
