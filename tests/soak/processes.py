"""The processes of a launch, found from outside by a mark in their environment, wherever they have gone."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from digitdist.distributed import read_beats

MARK = "DIGITDIST_SOAK"  # the environment variable whose value all processes of an attempt inherit


@dataclass(frozen=True)
class Position:
    """Where a running training is, as the heartbeat of its furthest rank says."""

    step: int
    phase: str


def marked(mark: str) -> list[psutil.Process]:
    """All processes of the attempt `mark` that are alive, zombies not among them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ranks(processes: Iterable[psutil.Process]) -> dict[int, psutil.Process]:
    """Those of `processes` that train, by their ranks: not launchers, whose arguments name the module too."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if words[1:2] in (["-u"], ["-m"]) and "digitdist.train" in words[2:4]:
                found[int(process.environ().get("RANK", "0"))] = process
    return found


def position(folder: Path, pids: set[int]) -> Position | None:
    """Where those of `pids` that train in `folder` are; None before they have begun, or where no heartbeat can be read."""
    beats = []
    for file in folder.glob(".heartbeat-*"):
        with contextlib.suppress(Exception):  # damaged, or just removed
            if file.is_file():
                beats += [beat for beat in read_beats(file.read_bytes()) if beat.pid in pids and beat.step < 1 << 30]
    furthest = max(beats, key=lambda beat: beat.place, default=None)
    return Position(furthest.step, furthest.phase) if furthest else None


def send(processes: Iterable[psutil.Process], number: int) -> None:
    """Sends a signal to each that is still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def left_after(mark: str, seconds: float) -> list[str]:
    """The command lines of processes of `mark` that are still there after so long; of those frozen for good, which may have
    neither a launcher nor other ranks any more that could end them, as long after they have been thawed."""
    left = _wait_for_end(mark, seconds)
    if frozen := [process for process in left if _is_frozen(process)]:
        send(frozen, signal.SIGCONT)
        left = _wait_for_end(mark, seconds)
    return [f"{process.pid} {' '.join(process.cmdline())[:100]}" for process in left if process.is_running()]


def _is_frozen(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_STOPPED
    return False


def _wait_for_end(mark: str, seconds: float) -> list[psutil.Process]:
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def end_all(mark: str) -> None:
    """Kills what is left of an attempt."""
    while left := marked(mark):
        send(left, signal.SIGKILL)
        time.sleep(0.05)
