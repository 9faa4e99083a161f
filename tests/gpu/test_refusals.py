"""One GPU: what cannot be had is refused, and a training that cannot go on ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import on_device
from helpers.on_device import FEW, FP32
from helpers.runs import raw_events, result

from digitdist.checkpoint import folders

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CASES = {
    "fp8": (*FEW, "train.precision=fp8"),
    "reduce-overhead": (*FEW, FP32, "train.compile=reduce-overhead", "train.accumulate=2"),
    "max-autotune": (*FEW, FP32, "train.compile=max-autotune", "train.accumulate=2"),
    "exact": (*FEW, FP32, "train.compile=default", "sync.mode=exact"),
    "infinite": (*FEW, FP32, "optim.name=sgd", "optim.lr=1e15", "train.log_every=10"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> tuple[Path, dict[str, Any]]:
    """A folder in which each of `CASES` was tried, and what was said."""
    place = tmp_path_factory.mktemp("refused")
    (place / "data").symlink_to(mnist_root)
    (found,) = on_device.train(CASES, place)
    return place, {name: case["error"] for name, case in found.items()}


@pytest.mark.claim("fp8 is refused, and a launcher that asks for it gets the GPU's best, with a line that says so")
def test_fp8_is_refused(place: Path, refused: tuple[Path, dict[str, Any]]):
    assert "train.precision=fp8" in refused[1]["fp8"]
    on_device.only_rehearsed("a simulated device has no autocast, which is its best")
    env = {"ACCELERATE_MIXED_PRECISION": "fp8"}
    told = on_device.launch("digitdist.train", *FEW, "run.name=a", "train.max_steps=1", cwd=place, env=env)
    assert told.code == 0, told.err
    assert "accelerate launch asked for fp8: fp8 is not supported; training uses" in told.out
    assert result(place / "runs/a")["precision"] in ("bf16", "fp16")


@pytest.mark.claim("train.compile with CUDA graphs is refused with train.accumulate, and any with sync.mode=exact")
@pytest.mark.parametrize("name", ["reduce-overhead", "max-autotune", "exact"])
def test_what_cannot_be_compiled_is_refused(refused: tuple[Path, dict[str, Any]], name: str):
    assert "is not allowed with" in refused[1][name]


@pytest.mark.claim("a loss that is not finite ends the run within train.log_every steps, and no checkpoint has seen it")
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(refused: tuple[Path, dict[str, Any]]):
    folder = refused[0] / "runs/infinite"
    assert "the loss of step 10 is" in refused[1]["infinite"]
    assert not raw_events(folder)
    assert not folders(folder / "checkpoints")
