"""One GPU: `torch.compile` changes speed and rounding, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import on_device
from helpers.on_device import FEW, FP32, SIMULATED
from helpers.predictions import assert_close
from helpers.runs import losses

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
# A dry run trains uncompiled, so that all but the compiler is tried.
MODES = ["none"] if SIMULATED else ["default", "reduce-overhead", "max-autotune"]
# Of 610 images: an epoch ends with a batch of 10, and evaluations have batches of 125.
COMMON = (*FEW, FP32, "train.max_steps=20")
NETWORKS = {
    "without dropout": ("model.name=convnet", "optim.ema=0.9"),
    "columns": ("model.name=columns", "optim.name=sgd", "optim.lr=0.03"),
    "dropout": ("model.name=cnn",),
}


def compare(place: Path, name: str, other: str, within: float) -> None:
    """The losses of two runs, and what the first one's weights have predicted compiled and not."""
    ours, theirs = (np.array(losses(place / f"runs/{run}")) for run in (name, other))
    assert np.abs(ours / theirs - 1).max() < within, (ours, theirs)
    assert_close(place / f"runs/{name}/predictions.npz", place / f"runs/{name}/uncompiled.npz", tolerance=0.01)


@pytest.mark.claim("train.compile: losses are near the uncompiled run's, and its weights predict the same compiled and not")
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_run_trains_and_predicts_as_an_uncompiled_one(place: Path, mode: str):
    networks = {"without dropout": NETWORKS["without dropout"]} if SIMULATED else NETWORKS
    cases = {f"{name}, {m}": (*COMMON, *own, f"train.compile={m}") for name, own in networks.items() for m in {"none", mode}}
    on_device.train(cases, place, watch="uncompiled", timeout=1700)
    for name in networks:
        compare(place, f"{name}, {mode}", f"{name}, none", within=0.3 if name == "dropout" else 0.02)
    on_device.only_rehearsed("a simulated device has no compiler")


@pytest.mark.claim("train.compile=default takes train.accumulate")
def test_a_compiled_run_accumulates(place: Path):
    on_device.only_rehearsed("a simulated device has no compiler")
    options = (*COMMON, *NETWORKS["without dropout"], "train.accumulate=3")
    cases = {"plain": options, "compiled": (*options, "train.compile=default")}
    on_device.train(cases, place, watch="uncompiled", timeout=1700)
    compare(place, "compiled", "plain", within=0.02)
