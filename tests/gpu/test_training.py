"""One GPU: it trains there, in every precision, and the host does not wait for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from helpers import on_device
from helpers.on_device import EVERYTHING, FEW, PRECISIONS, SIMULATED, skip_without
from helpers.runs import losses, result

from digitdist.models import MODELS

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
OPTIMIZERS = {"adam": 0.003, "adamw": 0.003, "sgd": 0.03}  # with their rates
PAIRS = [(model, name) for model in MODELS for name in OPTIMIZERS]
if SIMULATED:  # each network and each optimizer once
    PAIRS = [("cnn", "adam"), ("cnn_batchnorm", "adamw"), ("convnet", "sgd"), ("columns", "adam")]
Trained = tuple[str, Path, dict[str, Any]]
KINDS = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


@pytest.fixture(scope="module", params=PRECISIONS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Trained:
    """A precision, a folder with a run in it of each of `PAIRS`, and how each looked."""
    skip_without(request.param)
    place = tmp_path_factory.mktemp("trained")
    (place / "data").symlink_to(mnist_root)
    common = (*FEW, request.param, "train.max_steps=30")
    cases = {
        f"{model}, {name}": (*common, f"model.name={model}", f"optim.name={name}", f"optim.lr={OPTIMIZERS[name]}")
        for model, name in PAIRS
    }
    (found,) = on_device.train(cases, place, watch="looks", timeout=500)
    return request.param.partition("=")[2], place, found


@pytest.mark.claim("every network trains with every optimizer in fp32, bf16 and fp16, and result.json says in which and where")
def test_every_network_trains_with_every_optimizer(trained: Trained):
    precision, place, found = trained
    for name in found:
        final, seen = result(place / f"runs/{name}"), losses(place / f"runs/{name}")
        assert all(map(math.isfinite, seen)), name
        assert seen[-1] < seen[0] - 0.1, name
        assert (final["precision"], final["device"]) == (precision, on_device.device_type())
        (memory,) = final["peak_memory_mb"]
        assert (memory["device"] or 0) > 0 or on_device.device_type() not in on_device.WITH_MEMORY


@pytest.mark.claim("bf16 and fp16 are what a layer computes in, and auto takes one of them")
def test_a_layer_computes_in_the_precision_that_the_result_names(trained: Trained):
    precision, _, found = trained
    assert {looks["dtype"] for looks in found.values()} == {KINDS[precision]}
    on_device.only_rehearsed("a simulated device has no autocast")


@pytest.mark.claim("bf16 and fp16 are what a layer computes in, and auto takes one of them")
def test_auto_computes_in_half_the_bits(place: Path):
    on_device.only_rehearsed("a simulated device has no autocast")
    (found,) = on_device.train({"a": (*FEW, "train.precision=auto", "train.max_steps=2")}, place, watch="looks")
    reported = result(place / "runs/a")["precision"]
    assert reported in ("bf16", "fp16")
    assert found["a"]["dtype"] == KINDS[reported]


@pytest.mark.claim("images and order are on the GPU, the optimizer is fused, the layout channels-last; float32 may use TF32")
def test_everything_that_a_step_needs_is_on_the_device(trained: Trained):
    kind = on_device.device_type()
    for name, looks in trained[2].items():
        assert {looks[what].partition(":")[0] for what in ("weights on", "images on", "order on")} == {kind}, name
        assert looks["channels-last"], name
        assert looks["fused"], name
        assert looks["float32"] == ("high" if kind == "cuda" else "highest")
    on_device.only_rehearsed("only CUDA has TF32")


QUIET_CASES = {
    "all options": (*EVERYTHING, "model.name=columns", "data.focus=3"),
    "streamed": ("data.in_memory=false", "data.workers=1"),
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
    common = (*FEW, precision, "train.log_every=13", "train.max_steps=28", "train.eval_every=0", "checkpoint.every_steps=0")
    cases = {name: (*common, *own) for name, own in QUIET_CASES.items()}
    transfers = place / "transfers"
    (found,) = on_device.train(cases, place, watch="quiet_steps", env={"SIMULATED_TRANSFERS": str(transfers)})
    assert all(found[name]["quiet"] > 15 for name in cases), found
    if on_device.device_type() not in ("cuda", "sim"):
        pytest.skip("torch tells only of CUDA when a host waits for it")
    seen = on_device.transfers(transfers)
    assert bool(seen) == SIMULATED, "on CUDA torch itself raises"
    assert not [transfer for transfer in seen if transfer["step"] and not transfer["due"]]
