"""One GPU in fp16: a step whose gradient overflows is skipped, and changes nothing but the scale of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
PARTS = {"first part": ("run.name=a", "train.max_steps=7"), "second part": ("run.name=a",)}


@pytest.fixture(scope="module")
def overflown(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A folder with the runs of `CASES` and `PARTS`, and what each of their steps has changed."""
    skip_without(PRECISION)
    place = tmp_path_factory.mktemp("overflown")
    (place / "data").symlink_to(mnist_root)
    cases = {name: (*COMMON, *own) for name, own in (CASES | PARTS).items()}
    (found,) = on_device.train(cases, place, watch="overflow")
    return place, {name: case["steps"] for name, case in found.items()}


@pytest.mark.claim("fp16: a step that overflows is skipped; weights, momentum and what follows are as without it")
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_overflows_changes_the_scale_alone(overflown: tuple[Path, dict[str, list[dict[str, Any]]]], name: str):
    place, steps = overflown
    for step in steps[name]:
        forced = step["step"] in OVERFLOWS and not SIMULATED
        assert step["forced"] == forced
        assert step["finite"], step
        assert step["weights changed"] != forced, step
        assert step["optimizer changed"] != forced, step
        assert step["scale"][1] == step["scale"][0] * (0.5 if forced else 1), step
        assert step["momentum error"] < 1e-5, step
    found = losses(place / f"runs/{name}")
    assert len(found) == 12
    assert found[-1] < found[0]
    on_device.only_rehearsed("a simulated device has no fp16")


@pytest.mark.claim("fp16: the scale of the loss is saved, and resumed")
def test_the_scale_is_resumed(overflown: tuple[Path, dict[str, list[dict[str, Any]]]]):
    place, steps = overflown
    stored = read(folders(place / "runs/a/checkpoints")[0])
    assert stored.step == 7
    assert [step["step"] for step in steps["second part"]] == [8, 9, 10, 11, 12]
    on_device.only_rehearsed("a simulated device has no fp16")
    assert stored.state["scaler"]["scale"] == 65536 / 4, "two steps have overflowed"
    assert stored.state["scaler"]["_growth_tracker"] == 2, "steps since the last of them"
    assert steps["first part"][-1]["scale"][1] == steps["second part"][0]["scale"][0] == 65536 / 4
