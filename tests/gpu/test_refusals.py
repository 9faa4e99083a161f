"""One GPU: what cannot be had is refused, and a training that cannot go on ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import FEW, Trainings
from helpers.runs import raw_events, result

from digitdist.checkpoint import folders

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.claim("fp8 is refused, and a launcher that asks for it gets the GPU's best, with a line that says so")
def test_fp8_is_refused(place: Path, trainings: Trainings):
    (found,) = trainings.found("refused")
    assert "train.precision=fp8" in found["fp8"]["error"]
    on_device.only_rehearsed("a simulated device has no autocast, which is its best")
    env = {"ACCELERATE_MIXED_PRECISION": "fp8"}
    told = on_device.launch("digitdist.train", *FEW, "run.name=a", "train.max_steps=1", cwd=place, env=env)
    assert told.code == 0, told.err
    assert "accelerate launch asked for fp8: fp8 is not supported; training uses" in told.out
    assert result(place / "runs/a")["precision"] in ("bf16", "fp16")


@pytest.mark.claim("train.compile with CUDA graphs is refused with train.accumulate, and any with sync.mode=exact")
@pytest.mark.parametrize("name", ["reduce-overhead", "max-autotune", "compiled, exact"])
def test_what_cannot_be_compiled_is_refused(trainings: Trainings, name: str):
    (found,) = trainings.found("refused")
    assert "is not allowed with" in found[name]["error"]


@pytest.mark.claim("a loss that is not finite ends the run within train.log_every steps, and no checkpoint has seen it")
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(trainings: Trainings):
    (found,) = trainings.found("refused")
    assert "the loss of step 10 is" in found["infinite"]["error"]
    assert not raw_events(trainings.runs / "infinite")
    assert not folders(trainings.runs / "infinite/checkpoints")
