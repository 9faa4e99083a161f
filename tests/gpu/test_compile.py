"""One GPU: `torch.compile` changes speed and rounding, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import on_device
from helpers.on_device import SIMULATED, Trainings
from helpers.predictions import assert_close
from helpers.runs import losses
from helpers.trainings import COMPILED, MODES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


def compare(trainings: Trainings, name: str, mode: str, within: float) -> None:
    """The losses of a compiled and an uncompiled run, and what the first one's weights have predicted compiled and not."""
    for group in ("compiled, none", f"compiled, {mode}"):
        trainings.found(group)
    run = trainings.runs / f"{name}, {mode}"
    ours, theirs = (np.array(losses(folder)) for folder in (run, trainings.runs / f"{name}, none"))
    assert len(ours) == 4
    assert np.abs(ours / theirs - 1).max() < within, (ours, theirs)
    assert_close(run / "predictions.npz", run / "uncompiled.npz", tolerance=0.02)


@pytest.mark.claim("train.compile: losses are near the uncompiled run's, and its weights predict the same compiled and not")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_run_trains_and_predicts_as_an_uncompiled_one(trainings: Trainings, mode: str, name: str):
    compare(trainings, name, mode, within=0.3 if name == "dropout" else 0.05)  # compiled, it draws other numbers
    on_device.only_rehearsed("a simulated device has no compiler")


@pytest.mark.claim("train.compile=default takes train.accumulate")
def test_a_compiled_run_accumulates(trainings: Trainings):
    compare(trainings, "accumulated", "none" if SIMULATED else "default", within=0.05)
    on_device.only_rehearsed("a simulated device has no compiler")
