"""One GPU in fp16: a step whose gradient overflows is skipped, and changes nothing but the scale of the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import FEW, FP32, SIMULATED, skip_without
from helpers.runs import losses
from helpers.watchers import OVERFLOWS

from digitdist.checkpoint import folders, read

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
PRECISION = FP32 if SIMULATED else "train.precision=fp16"
COMMON = (*FEW, PRECISION, "train.log_every=1", "train.max_steps=12")
CASES = {
    "sgd": ("optim.name=sgd", "optim.lr=0.03"),
    "adam, BatchNorm, EMA": ("model.name=convnet", "optim.ema=0.9"),
    "clipped": ("optim.name=sgd", "optim.lr=0.03", "optim.clip_norm=1"),
    "accumulated": ("train.accumulate=2",),
    "exact": ("sync.mode=exact",),
}


@pytest.mark.claim("fp16: a step that overflows is skipped; weights, momentum and what follows are as without it")
def test_a_step_that_overflows_changes_the_scale_alone(place: Path):
    skip_without(PRECISION)
    (found,) = on_device.train({name: (*COMMON, *own) for name, own in CASES.items()}, place, watch="overflow")
    for name, of_case in found.items():
        for step in of_case["steps"]:
            forced = step["step"] in OVERFLOWS and not SIMULATED
            assert step["forced"] == forced
            assert step["finite"], (name, step)
            assert step["weights changed"] != forced, (name, step)
            assert step["optimizer changed"] != forced, (name, step)
            assert step["scale"][1] == step["scale"][0] * (0.5 if forced else 1), (name, step)
            assert step["momentum error"] < 1e-5, (name, step)
        assert losses(place / f"runs/{name}")[-1] < losses(place / f"runs/{name}")[0], name
    on_device.only_rehearsed("a simulated device has no fp16")


@pytest.mark.claim("fp16: the scale of the loss is saved, and resumed")
def test_the_scale_is_resumed(place: Path):
    skip_without(PRECISION)
    arguments = (*COMMON, "run.name=a")
    (first,) = on_device.train({"a": (*arguments, "train.max_steps=7")}, place, watch="overflow")
    stored = read(folders(place / "runs/a/checkpoints")[-1]).state.get("scaler", {})
    (second,) = on_device.train({"a": arguments}, place, watch="overflow")
    scales = first["a"]["steps"][-1]["scale"][1], second["a"]["steps"][0]["scale"][0]
    assert [step["step"] for step in second["a"]["steps"]] == [8, 9, 10, 11, 12]
    on_device.only_rehearsed("a simulated device has no fp16")
    assert scales == (stored["scale"], stored["scale"])
    assert stored["scale"] == 65536 / 4, "two steps have overflowed"
    assert stored["_growth_tracker"] == 2, "steps since the last of them"
