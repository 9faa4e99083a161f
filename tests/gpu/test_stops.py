"""One GPU: what stops a training saves it, also while the host waits for the GPU."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import FEW, FP32, SIMULATED
from helpers.runs import assert_same_run, wait_for_step, wait_until

from digitdist.checkpoint import folders
from digitdist.distributed import read_beats

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
LONG = (*FEW, FP32, "sync.mode=exact", "train.epochs=1000", "train.eval_every=0")
STOPS = ["SIGTERM", "STOP"] if SIMULATED else ["SIGTERM", "SIGINT", "SIGUSR1", "STOP"]


def ended(process: subprocess.Popen[str], within: float) -> tuple[str, float]:
    """The output of a process that ends, and in how many seconds it does."""
    began = time.monotonic()
    out, _ = process.communicate(timeout=60)
    seconds = time.monotonic() - began
    assert seconds < within, out
    return out, seconds


@pytest.mark.claim("SIGTERM, ^C, SIGUSR1 and the file STOP save a checkpoint and end with 75; the same command goes on")
@pytest.mark.parametrize("name", STOPS)
def test_a_stop_saves_and_ends_with_75(place: Path, name: str):
    process = on_device.start("digitdist.train", *LONG, "run.name=a", cwd=place)
    wait_for_step(place / "runs/a", 20, process)
    if name == "STOP":
        (place / "runs/a/STOP").touch()
    else:
        process.send_signal(getattr(signal, name))
    out, _ = ended(process, within=10)
    assert process.returncode == 75, out
    (saved,) = folders(place / "runs/a/checkpoints")
    step = int(saved.name.removeprefix("step-"))
    arguments = (*LONG, f"train.max_steps={step + 20}")
    on_device.train({"a": arguments, "unbroken": arguments}, place)
    assert_same_run(place / "runs/a", place / "runs/unbroken")


@pytest.mark.claim("^C twice ends with 130 within two seconds, also while the host waits in C++")
@pytest.mark.parametrize("fault", ["block rank=0 step=12 phase=update", "slow rank=0 step=12 phase=update"])
def test_a_second_interrupt_ends_at_once(place: Path, fault: str):
    process = on_device.start("digitdist.train", *LONG, "run.name=a", cwd=place, env={"DIGITDIST_FAULT": fault})
    wait_for_step(place / "runs/a", 10, process)
    (beats,) = (place / "runs/a").glob(".heartbeat-*")
    wait_until(lambda: any((beat.step, beat.phase) == (12, "update") for beat in read_beats(beats.read_bytes())))
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    out, _ = ended(process, within=2)
    assert process.returncode == 130, out
