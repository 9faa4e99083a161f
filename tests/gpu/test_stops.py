"""One GPU: what stops a training saves it, also while the host waits for the GPU."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import SIMULATED
from helpers.runs import ask_to_stop, assert_same_run, wait_for_phase
from helpers.trainings import EXACT_EVERYTHING

from digitdist.checkpoint import folders, read

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ARGUMENTS = (*EXACT_EVERYTHING, "run.name=a")
STOPS = ["SIGTERM"] if SIMULATED else ["SIGTERM", "SIGINT", "SIGUSR1", "STOP"]
WAITS = ["block"] if SIMULATED else ["block", "slow"]


def start_and_wait(place: Path, kind: str) -> subprocess.Popen[str]:
    """Starts a run, which stays in step 12: for two seconds, or with ``block`` for ever, as for a GPU that does not answer."""
    fault = {"DIGITDIST_FAULT": f"{kind} rank=0 step=12 phase=update"}
    process = on_device.start("digitdist.train", *ARGUMENTS, cwd=place, env=fault)
    wait_for_phase(place / "runs/a", 0, 12, "update", process)
    return process


@pytest.mark.claim("SIGTERM, ^C, SIGUSR1 and the file STOP save a checkpoint and end with 75; the same command goes on")
@pytest.mark.parametrize("name", STOPS)
def test_a_stop_saves_and_ends_with_75(place: Path, unbroken: Path, name: str):
    process = start_and_wait(place, "slow")
    ask_to_stop(process, place / "runs/a", name)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75, out
    stored = read(folders(place / "runs/a/checkpoints")[-1])
    assert stored.step in (13, 14, 15), "by the next line of the log the host has heard of it"
    if not SIMULATED:
        resumed = on_device.launch("digitdist.train", *ARGUMENTS, cwd=place)
        assert resumed.code == 0, resumed.err
        assert_same_run(place / "runs/a", unbroken)


@pytest.mark.claim("^C twice ends with 130 within two seconds, also while the host waits in C++")
@pytest.mark.parametrize("kind", WAITS)
def test_a_second_interrupt_ends_at_once(place: Path, kind: str):
    process = start_and_wait(place, kind)
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130, out
    assert time.monotonic() - began < 2, out
