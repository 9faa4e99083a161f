"""One GPU: it trains there, in every precision, and the host does not wait for it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from helpers import on_device
from helpers.on_device import EVERYTHING, FEW, FP32, PRECISIONS, SIMULATED, skip_without
from helpers.runs import losses, raw_events, result

from digitdist.checkpoint import folders
from digitdist.models import MODELS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
OPTIMIZERS = {"adam": 0.003, "adamw": 0.003, "sgd": 0.03}
KINDS = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


@pytest.mark.claim("every network trains with every optimizer in fp32, bf16 and fp16, and result.json says in which and where")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_network_trains_with_every_optimizer(place: Path, precision: str):
    skip_without(precision)
    options = (*FEW, precision, "train.max_steps=30")
    cases = {
        f"{model} {name}": (*options, f"model.name={model}", f"optim.name={name}", f"optim.lr={rate}")
        for model in MODELS
        for name, rate in OPTIMIZERS.items()
    }
    on_device.train(cases, place)
    for name in cases:
        final, found = result(place / f"runs/{name}"), losses(place / f"runs/{name}")
        assert all(map(math.isfinite, found)), name
        assert found[-1] < found[0] - 0.1, name
        assert (final["precision"], final["device"]) == (precision.partition("=")[2], on_device.device_type())
        (memory,) = final["peak_memory_mb"]
        assert (memory["device"] or 0) > 0 or on_device.device_type() not in on_device.WITH_MEMORY


@pytest.mark.claim("bf16 and fp16 are what the network computes in, and auto takes one of them")
@pytest.mark.parametrize("precision", PRECISIONS if SIMULATED else [*PRECISIONS, "train.precision=auto"])
def test_a_layer_computes_in_the_precision_that_the_result_names(place: Path, precision: str):
    if precision != "train.precision=auto":
        skip_without(precision)
    (found,) = on_device.train({"a": (*FEW, precision, "train.max_steps=2")}, place, watch="looks")
    reported = result(place / "runs/a")["precision"]
    assert found["a"]["dtype"] == KINDS[reported]
    assert reported in (("bf16", "fp16") if precision == "train.precision=auto" else (precision.partition("=")[2],))
    on_device.only_rehearsed("a simulated device has no autocast")


@pytest.mark.claim("fp8 is refused, and a launcher that asks for it gets the GPU's best, with a line that says so")
def test_fp8_is_refused(place: Path):
    asked = on_device.launch("digitdist.train", *FEW, "train.precision=fp8", cwd=place)
    assert asked.code == 2
    assert "train.precision=fp8" in asked.errors[0]
    env = {"ACCELERATE_MIXED_PRECISION": "fp8"}
    told = on_device.launch("digitdist.train", *FEW, "run.name=a", "train.max_steps=1", cwd=place, env=env)
    assert "accelerate launch asked for fp8: fp8 is not supported; training uses" in told.out
    on_device.only_rehearsed("a simulated device has no autocast, which is its best")
    assert told.code == 0, told.err
    assert result(place / "runs/a")["precision"] in ("bf16", "fp16")


@pytest.mark.claim("images and order are on the GPU, the optimizer is fused, the layout channels-last; float32 may use TF32")
def test_everything_that_a_step_needs_is_on_the_device(place: Path):
    (found,) = on_device.train({"a": (*FEW, FP32, "train.max_steps=2")}, place, watch="looks")
    looks, kind = found["a"], on_device.device_type()
    assert {looks[name].partition(":")[0] for name in ("weights on", "images on", "order on")} == {kind}
    assert looks["channels-last"]
    assert looks["fused"]
    assert looks["float32"] == ("high" if kind == "cuda" else "highest")
    on_device.only_rehearsed("only CUDA has TF32")


QUIET_CASES = {
    "ddp": (),
    "all options": EVERYTHING,
    "focus": ("data.focus=3",),
    "columns": (*EVERYTHING, "model.name=columns"),
    "BatchNorm": ("model.name=convnet",),
    "sgd": ("optim.name=sgd", "optim.lr=0.03"),
    "streamed": ("data.in_memory=false", "data.workers=1"),
    "exact": ("sync.mode=exact",),
    "exact, all options": (*EVERYTHING, "sync.mode=exact", "optim.name=sgd", "optim.lr=0.03"),
    "local": ("sync.mode=local", "sync.every=7"),
    "local, all options": (*EVERYTHING, "sync.mode=local", "sync.every=7", "sync.overlap=true"),
}


@pytest.mark.claim("a step in which nothing is due brings nothing to the host")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_in_which_nothing_is_due_brings_nothing_to_the_host(place: Path, precision: str):
    skip_without(precision)
    common = (*FEW, precision, "train.log_every=13", "train.max_steps=40", "train.eval_every=0", "checkpoint.every_steps=0")
    cases = {name: (*common, *own) for name, own in QUIET_CASES.items()}
    transfers = place / "transfers"
    (found,) = on_device.train(cases, place, watch="quiet_steps", env={"SIMULATED_TRANSFERS": str(transfers)})
    assert all(found[name]["quiet"] > 20 for name in cases), found
    if on_device.device_type() not in ("cuda", "sim"):
        pytest.skip("torch tells only of CUDA when a host waits for it")
    seen = on_device.transfers(transfers)
    assert bool(seen) == SIMULATED, "on CUDA torch itself raises"
    assert not [transfer for transfer in seen if transfer["step"] and not transfer["due"]]


@pytest.mark.claim("a loss that is not finite ends the run within train.log_every steps, and no checkpoint has seen it")
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(place: Path):
    options = ("optim.name=sgd", "optim.lr=1e15", "train.log_every=10", "run.name=a")
    done = on_device.launch("digitdist.train", *FEW, FP32, *options, cwd=place)
    assert done.code == 1
    assert "the loss of step 10 is" in done.err
    assert not raw_events(place / "runs/a")
    assert not folders(place / "runs/a/checkpoints")
