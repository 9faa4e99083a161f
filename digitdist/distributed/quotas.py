"""The share of a host's CPUs that a container may use: its quota in Linux's control groups, of either version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPUs that this process's control group and those above it may use, such as 1.5: the smallest quota of any of them.

    None where there is none, or no Linux. `root`: where ``/proc`` and ``/sys`` are.
    """
    quotas = (quota for folder in _groups(root) if (quota := _quota(folder)) is not None)
    return min(quotas, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups that may limit CPUs, and of all groups above them."""
    own, mounts = _lines(root / "proc/self/cgroup"), _lines(root / "proc/self/mountinfo")
    for line in own:  # hierarchy:controllers:path, without controllers in version 2
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not path or (controllers and "cpu" not in controllers.split(",")):
            continue
        for mount in mounts:  # … root, mount point, … - type, source, options
            before, _, after = mount.partition(" - ")
            kind, _, options = [*after.split(" ", 2), "", ""][:3]
            if before.count(" ") < 4:
                continue  # not as Linux writes it
            if (kind == "cgroup" and controllers and "cpu" in options.split(",")) or (kind == "cgroup2" and not controllers):
                yield from _up(root, path, *before.split(" ")[3:5])


def _up(root: Path, path: str, mounted: str, point: str) -> Iterator[Path]:
    """The folder of the group `path` and those above it, where the group `mounted` is mounted at `point`."""
    top = root / point.lstrip("/")
    own = PurePosixPath(path)
    # A container may see of its host's path only the end, or nothing: then its own group is the one that is mounted.
    inside = own.relative_to(mounted) if own.is_relative_to(mounted) and ".." not in own.parts else PurePosixPath()
    yield top
    for folder in (inside, *inside.parents):
        if folder.parts:
            yield top / folder


def _quota(folder: Path) -> float | None:
    """The quota that a group itself has, in CPUs."""
    values = " ".join(_lines(folder / "cpu.max")).split()  # version 2
    if not values:
        values = _lines(folder / "cpu.cfs_quota_us") + _lines(folder / "cpu.cfs_period_us")
    if len(values) != 2 or not all(value.isdecimal() and int(value) for value in values):
        return None  # "max" or -1: there is none
    return int(values[0]) / int(values[1])


def _lines(file: Path) -> list[str]:
    """The lines of a file; none where it cannot be read."""
    try:
        return file.read_text(errors="replace").splitlines()
    except OSError:
        return []
