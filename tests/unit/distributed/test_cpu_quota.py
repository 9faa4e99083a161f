"""Which CPUs a process may use: by its control groups and by affinity."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from digitdist.distributed.device import num_cores
from digitdist.distributed.quotas import cpu_quota

V1_MOUNT = "32 31 0:29 {} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
V2_MOUNT = "41 31 0:38 {} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"


def tree(root: Path, groups: str, mount: str, mounted: str = "/", **quotas: str) -> Path:
    """A fake ``/proc`` and ``/sys``: `quotas` of each group, whose name has ``_`` for ``/``."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"12:cpuset:/elsewhere\n{groups}\n1:name=systemd:/elsewhere\n")
    (root / "proc/self/mountinfo").write_text(f"30 1 0:3 / /proc rw - proc proc rw\n{mount.format(mounted)}\n")
    top = root / mount.split()[4].lstrip("/")
    for name, quota in quotas.items():
        folder = top / name.strip("_").replace("_", "/")
        folder.mkdir(parents=True, exist_ok=True)
        if mount == V2_MOUNT:
            (folder / "cpu.max").write_text(quota + "\n")
        else:
            for file, number in zip(("cpu.cfs_quota_us", "cpu.cfs_period_us"), quota.split(), strict=True):
                (folder / file).write_text(number + "\n")
    return root


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"_": "max 100000"}, None),
        ({}, None),
        ({"a_b": "100000 100000"}, 1.0),
        ({"a_b": "max 100000", "a": "150000 100000"}, 1.5),
        ({"a_b": "200000 100000", "a": "50000 100000", "_": "max 100000"}, 0.5),
        ({"a_b": "50000 100000", "a": "200000 100000"}, 0.5),
        ({"a_b": "max 100000", "other": "50000 100000"}, None),
    ],
)
def test_version_2_has_the_smallest_quota_on_the_path(tmp_path: Path, quotas: dict[str, str], expected: float | None):
    assert cpu_quota(tree(tmp_path, "0::/a/b", V2_MOUNT, **quotas)) == expected


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"_": "-1 100000"}, None),
        ({"docker_x": "100000 100000"}, 1.0),
        ({"docker_x": "-1 100000", "docker": "75000 50000"}, 1.5),
    ],
)
def test_version_1_has_the_smallest_quota_on_the_path(tmp_path: Path, quotas: dict[str, str], expected: float | None):
    assert cpu_quota(tree(tmp_path, "3:cpu,cpuacct:/docker/x", V1_MOUNT, **quotas)) == expected


@pytest.mark.parametrize(
    ("groups", "mount", "quota"),
    [("3:cpu,cpuacct:/docker/x", V1_MOUNT, "100000 100000"), ("0::/docker/x", V2_MOUNT, "100000 100000")],
)
def test_a_container_that_sees_its_hosts_path_finds_its_own_group_at_the_mount(
    tmp_path: Path, groups: str, mount: str, quota: str
):
    assert cpu_quota(tree(tmp_path / "same", groups, mount, "/docker/x", _=quota)) == 1.0
    assert cpu_quota(tree(tmp_path / "end", groups, mount, "/docker", x=quota)) == 1.0
    assert cpu_quota(tree(tmp_path / "other", groups, mount, "/../other", _=quota)) == 1.0


def test_without_control_groups_there_is_no_quota(tmp_path: Path):
    assert cpu_quota(tmp_path) is None


def test_cores_are_those_of_affinity_and_quota_and_at_least_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.delattr("os.process_cpu_count", raising=False)
    assert [num_cores(quota) for quota in (None, 0.5, 1.0, 2.9, 4.0, 16.0)] == [4, 1, 1, 2, 4, 4]
    monkeypatch.setattr("os.process_cpu_count", lambda: 3, raising=False)
    assert [num_cores(quota) for quota in (None, 2.0, 16.0)] == [3, 2, 3]


@pytest.fixture
def group() -> Iterator[Path]:
    """A real control group with a quota of 1.5 CPUs, of version 1 or 2."""
    roots = [Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")]
    files = {"cpu.cfs_quota_us": "150000", "cpu.max": "150000 100000"}
    for root in roots:
        folder = root / f"digitdist-test-{os.getpid()}"
        try:
            folder.mkdir()
            file = next(file for file in files if (folder / file).exists())
            (folder / file).write_text(files[file])
        except (OSError, StopIteration):
            if folder.exists():
                folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("no permission to make a control group that limits CPUs")


@pytest.mark.cluster
def test_a_process_in_a_real_group_finds_its_quota(group: Path):
    code = (
        f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid()))\n"
        "from digitdist.distributed.quotas import cpu_quota; print(cpu_quota())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1.5\n"
