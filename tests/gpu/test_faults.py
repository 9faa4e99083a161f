"""Two GPUs or more: a rank that ends is named, and the launcher brings the run back."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from helpers import on_device
from helpers.launching import ROOT, run_in
from helpers.on_device import FP32, SIMULATED
from helpers.runs import assert_same_run, attempts, wait_for_phase
from helpers.trainings import EXACT, EXACT_EVERYTHING

pytestmark = [pytest.mark.gpu, pytest.mark.needs(gpus=2), pytest.mark.timeout(300)]
TIMEOUT_S = 3 if SIMULATED else 10
KINDS = ("kill", "raise", "freeze", "block")
PHASES = {"data": 12, "forward": 12, "backward": 12, "sync": 12, "update": 12, "log": 15, "eval": 13, "save": 10}  # and a step
PAIRS = [(kind, phase) for phase in PHASES for kind in KINDS]
if SIMULATED:
    PAIRS = [("block", "update")]


@pytest.mark.claim("a rank that ends or hangs, in any phase of a step, is named with its place within sync.timeout_s + 5 s")
@pytest.mark.parametrize(("kind", "phase"), PAIRS)
def test_a_rank_that_ends_is_named(place: Path, kind: str, phase: str):
    fault = {"DIGITDIST_FAULT": f"{kind} rank=1 step={PHASES[phase]} phase={phase}"}
    own = (f"sync.timeout_s={TIMEOUT_S}", "run.name=a")
    process = on_device.start("digitdist.train", *EXACT, FP32, *own, cwd=place, processes=2, env=fault)
    wait_for_phase(place / "runs/a", 1, PHASES[phase], phase, process)
    began = time.monotonic()
    workers = psutil.Process(process.pid).children()
    gone, _ = psutil.wait_procs(workers, timeout=TIMEOUT_S + 30)
    seconds = time.monotonic() - began
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    reported = [line for line in out.splitlines() if line.startswith("fault:")]
    assert len(reported) == 1, out
    assert "rank 1 " in reported[0]
    assert f"step {PHASES[phase]}, phase {phase}" in reported[0]
    assert len(gone) == len(workers)
    assert seconds < TIMEOUT_S + 5, f"{seconds:.1f} s\n{out}"


@pytest.mark.claim("launch/elastic.sh brings a run back whose rank has ended or hangs, and it ends with the same bits")
@pytest.mark.parametrize("kind", ["kill"] if SIMULATED else KINDS)
def test_the_launcher_brings_a_run_back(place: Path, unbroken: Path, kind: str):
    fault = {"DIGITDIST_FAULT": f"{kind} rank=1 step=14 phase=backward"}
    script = [str(ROOT / "launch/elastic.sh"), "2", *EXACT_EVERYTHING, f"sync.timeout_s={TIMEOUT_S}", "run.name=a"]
    done = run_in(on_device.environment_of_script(place, fault), script, place, timeout=200)
    assert done.code == 0, done.err
    assert [attempt["step"] for attempt in attempts(place / "runs/a")] == [0, 10]
    (reported,) = [line for line in done.err.splitlines() if line.startswith("fault:")]
    assert "rank 1 " in reported
    assert "step 14, phase backward" in reported
    assert_same_run(place / "runs/a", unbroken)
