"""One GPU: `sync.mode=exact` gives the same bits each time, wherever a share begins, and through a crash."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import EXACT_EVERYTHING
from helpers.runs import assert_same_run, attempts
from helpers.watchers import WORLDS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.claim("exact: the same command gives the same weights, metric lines and predictions, bit for bit")
def test_the_same_run_twice_is_the_same(exact_runs: Path):
    folders = sorted((exact_runs / "runs").iterdir())
    assert len(folders) > 3
    for again, once in zip(folders[::2], folders[1::2], strict=True):
        assert once.name == again.name.replace("again", "once")
        assert_same_run(again, once)


@pytest.mark.claim("exact: a shard has the same gradient, bit for bit, wherever the share of a rank begins")
def test_a_shard_has_the_same_gradient_wherever_a_share_begins(exact_runs: Path):
    found = {name: case for name, case in json.loads((exact_runs / "found.json").read_text()).items() if "once" in name}
    assert len(found) > 1
    steps = (0, 4, 8, 12, 16)  # of 50 images, and 10 in step 12, the last of an epoch
    expected = {"compared": [[step, world_size] for step in steps for world_size in WORLDS], "different": []}
    assert all(case == expected for case in found.values()), found


@pytest.mark.claim("exact: a run that is killed, and resumed by the same command, ends with the same bits")
def test_a_killed_run_ends_as_the_unbroken_one(place: Path, unbroken: Path):
    arguments = ("digitdist.train", *EXACT_EVERYTHING, "run.name=a")
    fault = {"DIGITDIST_FAULT": "kill rank=0 step=17 phase=backward"}
    killed = on_device.launch(*arguments, cwd=place, env=fault)
    assert killed.code == -signal.SIGKILL
    resumed = on_device.launch(*arguments, cwd=place)
    assert resumed.code == 0, resumed.err
    assert [attempt["step"] for attempt in attempts(place / "runs/a")] == [0, 10]
    assert_same_run(place / "runs/a", unbroken)
