"""What a run has left, read for comparison, and waiting until it has got somewhere."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from digitdist.distributed import read_beats

T = TypeVar("T")


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def attempts(folder: Path) -> list[dict]:
    return json.loads((folder / "environment.json").read_text())["starts"]


def only_run(cwd: Path) -> Path:
    """The one run folder that a launch has left."""
    (folder,) = (cwd / "runs").iterdir()
    return folder


def raw_events(folder: Path) -> list[dict]:
    """The complete metric lines of a run so far; none where it has not begun."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def events(folder: Path) -> list[dict]:
    """The metric lines of a run, without what differs between two equal runs: wall time."""
    differs = ("time", "train/images_per_second")
    return [{k: v for k, v in line.items() if k not in differs and not k.startswith("time/")} for line in raw_events(folder)]


def losses(folder: Path) -> list[float]:
    """The training loss of each line of the log."""
    return [event["train/loss"] for event in events(folder) if "train/loss" in event]


def reached(folder: Path) -> int:
    """The step of the last metric line."""
    return max((event["step"] for event in raw_events(folder)), default=0)


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, metric lines and predictions are equal, to the bit."""
    assert result(folder)["weights_sha256"] == result(other)["weights_sha256"]
    assert events(folder) == events(other)
    ours, theirs = (np.load(f / "predictions.npz") for f in (folder, other))
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)


def wait_until(condition: Callable[[], T], timeout: float = 100, failure: Callable[[], object] = lambda: "") -> T:
    """What `condition` returns, as soon as that is true; `failure` says more where it never is."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, failure()
        time.sleep(0.02)
    return found


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run that `process` trains has logged `step`."""

    def is_there() -> bool:
        assert process.poll() is None, process.communicate()
        return reached(folder) >= step

    wait_until(is_there)


def wait_for_phase(folder: Path, rank: int, step: int, phase: str, process: subprocess.Popen) -> None:
    """Until a rank of the run that `process` trains is in this phase of a step, as its heartbeat says."""

    def is_there() -> bool:
        assert process.poll() is None, process.communicate()
        beats = [beat for file in folder.glob(".heartbeat-*") for beat in read_beats(file.read_bytes())]
        return any((beat.rank, beat.step, beat.phase) == (rank, step, phase) for beat in beats)

    wait_until(is_there)


def ask_to_stop(process: subprocess.Popen, folder: Path, how: str) -> None:
    """Asks the run that `process` trains to stop: by the signal of that name, or by the file STOP."""
    if how == "STOP":
        (folder / "STOP").touch()
    else:
        process.send_signal(getattr(signal, how))
