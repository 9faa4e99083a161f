"""One GPU: `sync.mode=exact` gives the same bits each time, wherever a share begins, and through a crash."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import EVERYTHING, FEW, FP32, SIMULATED
from helpers.runs import assert_same_run, attempts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
EXACT = (*FEW, "sync.mode=exact", "train.max_steps=30", "checkpoint.every_steps=10")
OPTIONS = {
    "dropout": (FP32,),
    "everything": (*EVERYTHING, "sync.shards=3", "data.focus=2", FP32 if SIMULATED else "train.precision=auto"),
    "sgd, fp16": ("optim.name=sgd", "optim.lr=0.03", FP32 if SIMULATED else "train.precision=fp16"),
}


@pytest.mark.claim("exact: the same command gives the same weights, metric lines and predictions, bit for bit")
def test_the_same_run_twice_is_the_same(place: Path):
    cases = {f"{name}, {time}": (*EXACT, *own) for name, own in OPTIONS.items() for time in ("once", "again")}
    on_device.train(cases, place)
    for name in OPTIONS:
        assert_same_run(place / f"runs/{name}, once", place / f"runs/{name}, again")


@pytest.mark.claim("exact: a shard has the same gradient, bit for bit, wherever the share of a rank begins")
def test_a_shard_has_the_same_gradient_wherever_a_share_begins(place: Path):
    cases = {name: (*EXACT, *own, "train.max_steps=14") for name, own in OPTIONS.items()}
    (found,) = on_device.train(cases, place, watch="offsets")
    assert all(of_case == {"compared": 3 * 14, "different": []} for of_case in found.values()), found


@pytest.mark.claim("exact: a run that is killed, and resumed by the same command, ends with the same bits")
def test_a_killed_run_ends_as_the_unbroken_one(place: Path):
    arguments = (*EXACT, *OPTIONS["everything"])
    on_device.train({"unbroken": arguments}, place)
    fault = {"DIGITDIST_FAULT": "kill rank=0 step=17 phase=backward"}
    killed = on_device.launch("digitdist.train", *arguments, "run.name=a", cwd=place, env=fault)
    assert killed.code == -signal.SIGKILL
    resumed = on_device.launch("digitdist.train", *arguments, "run.name=a", cwd=place)
    assert resumed.code == 0, resumed.err
    assert [attempt["step"] for attempt in attempts(place / "runs/a")] == [0, 10]
    assert_same_run(place / "runs/a", place / "runs/unbroken")
