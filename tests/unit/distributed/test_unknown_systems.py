"""A kernel or container that tells nothing of itself, or tells it otherwise, costs no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from digitdist.distributed import cpu_quota, device_name, failures, launcher, launcher_start_time, peak_memory_mb

STATUS = {
    "gVisor": "Name:\tpython3\nVmSize:\t  1 kB\nVmRSS:\t  1 kB\n",
    "without a number": "VmHWM:\n",
    "of another form": "VmHWM:\tmuch kB\n",
    "empty": "",
    "missing": OSError(2, "No such file"),
    "hidden": PermissionError(13, "Permission denied"),
}


def show(monkeypatch: pytest.MonkeyPatch, content: str | OSError) -> None:
    """Has every file of the system hold `content`."""

    def read_text(file: Path, **options: Any) -> str:
        if isinstance(content, OSError):
            raise content
        return content

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize("content", STATUS.values(), ids=STATUS)
def test_peak_memory_that_is_not_told_is_none(monkeypatch: pytest.MonkeyPatch, content: str | OSError):
    monkeypatch.setattr("sys.platform", "linux")
    show(monkeypatch, content)
    assert peak_memory_mb(torch.device("cpu")) == {"host": None, "device": None}


def test_peak_memory_that_is_told_is_in_mib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.platform", "linux")
    show(monkeypatch, "Name:\tpython3\nVmHWM:\t  2048 kB\n")
    assert peak_memory_mb(torch.device("cpu")) == {"host": 2.0, "device": None}


@pytest.mark.parametrize("content", [*STATUS.values(), "model name", "\udcff: \udcff"])
def test_a_cpu_without_a_name_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch, content: str | OSError):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    show(monkeypatch, content)
    assert device_name("cpu") in ("x86_64", "")


@pytest.mark.parametrize("cgroup", ["", "0", "0::", "::::", "\0", "0::/job\n1:cpu:/job"])
@pytest.mark.parametrize("mountinfo", ["", " - ", "1 2 3 - cgroup2", "1 2 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup rw"])
@pytest.mark.parametrize("limit", ["", "max", "100 0", "-1 100000", "much 100000", "0 100000", "1 2 3"])
def test_a_quota_that_cannot_be_read_limits_nothing(tmp_path: Path, cgroup: str, mountinfo: str, limit: str):
    files = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, "sys/fs/cgroup/cpu.max": limit}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode() + b"\xff" * (content == "\0"))
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    "error", [psutil.NoSuchProcess(1), psutil.AccessDenied(1), RuntimeError("btime"), OSError(), IndexError()]
)
def test_processes_that_are_hidden_are_neither_launchers_nor_gone(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def hide(pid: int) -> None:
        raise error

    monkeypatch.setattr(psutil, "Process", hide)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert launcher_start_time() is None
    assert not launcher.is_launcher(1)
    assert failures._is_gone(1) == isinstance(error, psutil.NoSuchProcess)
    assert not failures._is_frozen(1)
