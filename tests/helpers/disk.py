"""A file system that can be filled."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "16m") -> Iterator[None]:
    """Makes `folder`, which is a small file system of its own where this is root on Linux, until the block ends."""
    folder.mkdir()
    may_mount = sys.platform == "linux" and os.geteuid() == 0
    if may_mount:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", str(folder)], check=True)
    try:
        yield
    finally:
        if may_mount:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
