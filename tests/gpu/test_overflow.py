"""One GPU in fp16: a step whose gradient overflows is skipped, and changes nothing but the scale of the loss."""

from __future__ import annotations

import math

import pytest
from helpers import on_device
from helpers.on_device import SIMULATED, Trainings, skip_without
from helpers.runs import losses
from helpers.trainings import FP16, OVERFLOWING
from helpers.watchers import OVERFLOWS

from digitdist.checkpoint import folders, read

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.mark.claim("fp16: a step that overflows is skipped; weights, momentum and what follows are as without it")
@pytest.mark.parametrize("name", OVERFLOWING)
def test_a_step_that_overflows_changes_the_scale_alone(trainings: Trainings, name: str):
    skip_without(FP16)
    (found,) = trainings.found("overflow")
    for step in found[name]["steps"]:
        forced = step["step"] in OVERFLOWS and not SIMULATED
        assert step["forced"] == forced
        assert step["finite"], step
        assert step["weights changed"] != forced, step
        assert step["optimizer changed"] != forced, step
        assert step["scale"][1] == step["scale"][0] * (0.5 if forced else 1), step
        assert step["momentum error"] < 1e-5, step
    seen = losses(trainings.runs / name)
    assert len(seen) > 5
    assert all(map(math.isfinite, seen))
    on_device.only_rehearsed("a simulated device has no fp16")


@pytest.mark.claim("fp16: the scale of the loss is saved, and resumed")
def test_the_scale_is_resumed(trainings: Trainings):
    skip_without(FP16)
    (found,) = trainings.found("overflow")
    steps = [found[name]["steps"] for name in ("scaled, first part", "scaled")]
    assert [[step["step"] for step in part][:2] for part in steps] == [[1, 2], [5, 6]]
    stored = read(folders(trainings.runs / "scaled/checkpoints")[0])
    assert stored.step == 4
    on_device.only_rehearsed("a simulated device has no fp16")
    assert stored.state["scaler"]["scale"] == 65536 / 2, "one step has overflowed"
    assert stored.state["scaler"]["_growth_tracker"] == 3, "steps since then"
    assert steps[0][-1]["scale"][1] == steps[1][0]["scale"][0] == 65536 / 2
