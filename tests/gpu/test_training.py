"""One GPU: it trains there, in every precision, and the host does not wait for it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import FEW, PRECISIONS, SIMULATED, Trainings, skip_without
from helpers.runs import losses, result
from helpers.trainings import EVERYTHING

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
KINDS = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


@pytest.mark.claim("every network trains with every optimizer in fp32, bf16 and fp16, and result.json says in which and where")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_network_trains_with_every_optimizer(trainings: Trainings, precision: str):
    skip_without(precision)
    (found,) = trainings.found(f"networks, {precision}")
    assert len(found) > 3
    for name in found:
        final, seen = result(trainings.runs / name), losses(trainings.runs / name)
        assert all(map(math.isfinite, seen)), name
        assert seen[-1] < seen[0] - 0.1, name
        assert (final["precision"], final["device"]) == (precision.partition("=")[2], on_device.device_type())
        (memory,) = final["peak_memory_mb"]
        assert (memory["device"] or 0) > 0 or on_device.device_type() not in on_device.WITH_MEMORY


@pytest.mark.claim("bf16 and fp16 are what a layer computes in, and auto takes one of them")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_layer_computes_in_the_precision_that_the_result_names(trainings: Trainings, precision: str):
    skip_without(precision)
    (found,) = trainings.found(f"networks, {precision}")
    assert {looks["dtype"] for looks in found.values()} == {KINDS[precision.partition("=")[2]]}
    on_device.only_rehearsed("a simulated device has no autocast")


@pytest.mark.claim("bf16 and fp16 are what a layer computes in, and auto takes one of them")
def test_auto_computes_in_half_the_bits(trainings: Trainings):
    (found,) = trainings.found("auto")
    reported = result(trainings.runs / "auto")["precision"]
    assert found["auto"]["dtype"] == KINDS[reported]
    on_device.only_rehearsed("a simulated device has no autocast")
    assert reported in ("bf16", "fp16")


@pytest.mark.claim("images and order are on the GPU, the optimizer is fused, the layout channels-last; float32 may use TF32")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_everything_that_a_step_needs_is_on_the_device(trainings: Trainings, precision: str):
    skip_without(precision)
    (found,) = trainings.found(f"networks, {precision}")
    kind = on_device.device_type()
    for name, looks in found.items():
        assert {looks[what].partition(":")[0] for what in ("weights on", "images on", "order on")} == {kind}, name
        assert looks["channels-last"], name
        assert looks["fused"], name
        assert looks["float32"] == ("high" if kind == "cuda" else "highest")
    on_device.only_rehearsed("only CUDA has TF32")


QUIET_CASES = {
    "all options": (*EVERYTHING, "model.name=columns", "data.focus=3"),
    "streamed": ("data.in_memory=false", f"data.workers={0 if SIMULATED else 1}"),
    "exact, all options": (*EVERYTHING, "sync.mode=exact", "sync.shards=2", "optim.name=sgd", "optim.lr=0.03"),
    "local, all options": (*EVERYTHING, "sync.mode=local", "sync.every=7", "sync.overlap=true"),
}
if not SIMULATED:
    QUIET_CASES |= {
        "ddp": (),
        "focus": ("data.focus=3",),
        "BatchNorm": ("model.name=convnet",),
        "sgd": ("optim.name=sgd", "optim.lr=0.03"),
        "exact": ("sync.mode=exact",),
        "local": ("sync.mode=local", "sync.every=7"),
    }


@pytest.mark.claim("a step in which nothing is due brings nothing to the host")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_in_which_nothing_is_due_brings_nothing_to_the_host(place: Path, precision: str):
    skip_without(precision)
    common = (*FEW, precision, "train.log_every=6", "train.max_steps=16", "train.eval_every=0", "checkpoint.every_steps=0")
    cases = {name: (*common, *own) for name, own in QUIET_CASES.items()}
    transfers = place / "transfers"
    (found,) = on_device.train(cases, place, watch="quiet_steps", env={"SIMULATED_TRANSFERS": str(transfers)})
    assert all(found[name]["quiet"] > 7 for name in cases), found
    if on_device.device_type() not in ("cuda", "sim"):
        pytest.skip("torch tells only of CUDA when a host waits for it")
    seen = on_device.transfers(transfers)
    assert bool(seen) == SIMULATED, "on CUDA torch itself raises"
    assert not [transfer for transfer in seen if transfer["step"] and not transfer["due"]]
