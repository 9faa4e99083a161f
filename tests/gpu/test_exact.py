"""One GPU: `sync.mode=exact` gives the same bits each time, wherever a share begins, and through a crash."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import Trainings
from helpers.runs import assert_same_run, attempts
from helpers.trainings import EXACT_EVERYTHING, EXACT_OPTIONS
from helpers.watchers import WORLDS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.claim("exact: the same command gives the same weights, metric lines and predictions, bit for bit")
@pytest.mark.parametrize("name", EXACT_OPTIONS)
def test_the_same_run_twice_is_the_same(trainings: Trainings, name: str):
    trainings.found("exact runs")
    assert_same_run(trainings.runs / f"{name}, again", trainings.runs / f"{name}, once")


@pytest.mark.claim("exact: a shard has the same gradient, bit for bit, wherever the share of a rank begins")
@pytest.mark.parametrize("name", EXACT_OPTIONS)
def test_a_shard_has_the_same_gradient_wherever_a_share_begins(trainings: Trainings, name: str):
    (found,) = trainings.found("exact runs")
    steps = (0, 4, 8, 12)  # of 50 images, and 10 in step 12, the last of an epoch
    assert found[f"{name}, once"] == {"compared": [[step, size] for step in steps for size in WORLDS], "different": []}


@pytest.mark.claim("exact: a run that is killed, and resumed by the same command, ends with the same bits")
def test_a_killed_run_ends_as_the_unbroken_one(place: Path, unbroken: Path):
    arguments = ("digitdist.train", *EXACT_EVERYTHING, "run.name=a")
    fault = {"DIGITDIST_FAULT": "kill rank=0 step=14 phase=backward"}
    killed = on_device.launch(*arguments, cwd=place, env=fault)
    assert killed.code == -signal.SIGKILL
    resumed = on_device.launch(*arguments, cwd=place)
    assert resumed.code == 0, resumed.err
    assert [attempt["step"] for attempt in attempts(place / "runs/a")] == [0, 10]
    assert_same_run(place / "runs/a", unbroken)
