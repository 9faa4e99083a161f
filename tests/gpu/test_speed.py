"""One GPU: speed, in numbers beside the claims."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import BEST, FEW, SIMULATED, Report, Trainings
from helpers.runs import result
from helpers.trainings import PROFILED

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SPEED = "speed: with batches of 8,192 the trainer has at least 0.9 of the bare loop's images a second"
BUSY = 8192  # images that keep a GPU busy; with fewer it waits for the host, and the numbers are only reported


@pytest.mark.claim(SPEED)
@pytest.mark.parametrize("batch_size", [100] if SIMULATED else [100, 1000, BUSY])
def test_the_trainer_is_as_fast_as_the_bare_loop(place: Path, report: Report, batch_size: int):
    steps, repeats = (5, 1) if SIMULATED else (300, 3)
    options = (*(FEW if SIMULATED else ()), f"data.batch_size={batch_size}", BEST)
    done = on_device.launch("helpers.speed_worker", str(steps), str(repeats), *options, cwd=place)
    assert done.code == 0, done.err
    rates = {name: statistics.median(of_loop) for name, of_loop in json.loads(done.out.splitlines()[-1]).items()}
    assert min(rates.values()) > 0
    on_device.only_rehearsed("a simulated device has no speed")
    shown = ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rates.items())
    report(f"batch {batch_size}: trainer : bare loop {rates['trainer'] / rates['bare loop']:.2f} ({shown})")
    assert batch_size < BUSY or rates["trainer"] >= 0.9 * rates["bare loop"]


@pytest.mark.claim("a profile shows the kernels of a step, and no copy to the host where nothing is due")
def test_a_profile_shows_the_kernels_of_a_step(trainings: Trainings, report: Report):
    trainings.found("profiled")
    events = json.loads((trainings.runs / "profiled/trace.json").read_text())["traceEvents"]
    assert len([event for event in events if str(event.get("name")).startswith("ProfilerStep")]) >= PROFILED
    on_device.only_rehearsed("a simulated device has no kernels")
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and "DtoH" in event["name"]]
    report(f"{len(kernels) / PROFILED:.0f} kernels a step, {len(copies)} copies to the host in {PROFILED} steps")
    assert kernels
    assert not copies


@pytest.mark.claim("--config fast reaches 99 %")
def test_the_recipe_fast_reaches_99_percent(trainings: Trainings, report: Report):
    trainings.found("recipe")
    final = result(trainings.runs / "fast")
    assert final["steps"] == (3 if SIMULATED else 131)
    on_device.only_rehearsed("a dry run has no time for it")
    report(f"{100 * final['test_accuracy']:.2f} % in {final['train_seconds']:.2f} s of training, {final['precision']}")
    assert final["test_accuracy"] > 0.987, "99.05 % less 4 deviations"
