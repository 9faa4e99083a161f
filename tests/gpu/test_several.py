"""Two GPUs or more: what `exact`, `ddp` and `local` promise of each other on any number of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import on_device
from helpers.on_device import EVERYTHING, FEW, FP32, PRECISIONS, SIMULATED, skip_without
from helpers.runs import assert_same_run, losses, result

pytestmark = [pytest.mark.gpu, pytest.mark.needs(gpus=2), pytest.mark.timeout(900)]
# Shards of 7 or 8 images of 50, and 1 or 2 in the last batch of an epoch: no number of ranks divides them.
UNEVEN = (*EVERYTHING, "sync.shards=7", "train.accumulate=1", FP32 if SIMULATED else "train.precision=auto")
EXACT = (*FEW, *UNEVEN, "sync.mode=exact", "train.max_steps=30", "checkpoint.every_steps=11", "sync.check_every=5")


def most() -> int:
    """The largest world that is tried."""
    return min(on_device.num_devices(), 7)


@pytest.mark.claim("exact: the same bits on 1, 2, … GPUs, with uneven shards and short last batches")
def test_an_exact_run_is_the_same_run_on_any_number_of_gpus(place: Path):
    for world_size in range(1, most() + 1):
        on_device.train({f"on {world_size}": EXACT}, place, processes=world_size)
        assert result(place / f"runs/on {world_size}")["world_size"] == world_size
        assert_same_run(place / f"runs/on {world_size}", place / "runs/on 1")


@pytest.mark.claim("exact: a run that is resumed on another number of GPUs ends with the same bits")
def test_an_exact_run_is_resumed_on_another_number_of_gpus(place: Path):
    on_device.train({"a": (*EXACT, "train.max_steps=13")}, place, processes=most())
    on_device.train({"a": EXACT, "unbroken": EXACT}, place, processes=2 if SIMULATED else 1)
    assert_same_run(place / "runs/a", place / "runs/unbroken")


# On a CPU, and so on a simulated device, float32 is float32; TF32 is switched off. What else there is comes from bf16's 8 and
# fp16's 11 bits of a number, which kernels for other batch sizes may round otherwise.
TOLERANCES = {FP32: 1e-5, "train.precision=bf16": 3e-2, "train.precision=fp16": 4e-3}
SMOOTH = (*FEW, "model.target=helpers.networks.Smooth", "train.log_every=1")


@pytest.mark.claim("ddp: without dropout and BatchNorm the losses of several GPUs are those of one, to rounding")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_losses_of_several_gpus_are_those_of_one(place: Path, report, precision: str):
    skip_without(precision)
    options, env = (*SMOOTH, precision, "train.max_steps=100"), {"NVIDIA_TF32_OVERRIDE": "0"}
    for world_size in (1, 2 if SIMULATED else most()):
        on_device.train({f"on {world_size}": (*options, "train.eval_every=0")}, place, processes=world_size, env=env)
    one, several = (np.array(losses(place / f"runs/on {world_size}")) for world_size in (1, 2 if SIMULATED else most()))
    assert len(one) == 100
    difference = np.abs(one - several).max()
    report(f"{precision.partition('=')[2]}: the largest difference in 100 steps is {difference:.1e}")
    assert difference < TOLERANCES[precision]


@pytest.mark.claim("sync.batch_norm: with BatchNorm too the losses of several GPUs are those of one, to rounding")
@pytest.mark.needs(gpus=2, cuda="torch's SyncBatchNorm takes no other")
def test_with_synchronised_batchnorm_the_losses_are_those_of_one(place: Path):
    synchronised = () if SIMULATED else ("sync.batch_norm=true",)
    options = (*FEW, FP32, "model.name=convnet", "train.log_every=1", "train.max_steps=20", "data.args.count=600")
    found = []
    for world_size in (1, 2):
        env = {"NVIDIA_TF32_OVERRIDE": "0"}
        on_device.train({f"on {world_size}": (*options, *synchronised)}, place, processes=world_size, env=env)
        found.append(losses(place / f"runs/on {world_size}"))
    on_device.only_rehearsed("torch's SyncBatchNorm needs CUDA")
    assert np.abs(np.subtract(*found)).max() < 1e-3


COMPRESSIONS = ["powersgd"] if SIMULATED else ["bf16", "fp16", "powersgd"]


@pytest.mark.claim(
    "compressed ddp: equal ranks, the loss of the first step unrounded, and a resumed run has the bits of an unbroken one"
)
@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_compressed_run_is_resumed_without_a_trace(place: Path, compress: str):
    options = (*SMOOTH, FP32, "train.max_steps=30", "sync.check_every=1", "train.eval_every=0")
    compressed = (*options, f"sync.compress={compress}")
    cases = {"unbroken": compressed, "a": (*compressed, "train.max_steps=17"), "plain": (*options, "train.max_steps=1")}
    check_resuming(place, cases, compressed)
    first, plain = (losses(place / f"runs/{name}")[0] for name in ("unbroken", "plain"))
    assert first == pytest.approx(plain, rel=1e-6)


@pytest.mark.claim("local, with and without sync.overlap: equal ranks, and a resumed run has the bits of an unbroken one")
@pytest.mark.parametrize("overlap", ["false", "true"])
def test_a_local_run_is_resumed_without_a_trace(place: Path, overlap: str):
    options = (
        *FEW,
        FP32,
        "model.name=convnet",
        "optim.ema=0.9",
        "train.max_steps=30",
        "sync.check_every=1",
        "train.eval_every=0",
    )
    local = (*options, "sync.mode=local", "sync.every=5", f"sync.overlap={overlap}", "checkpoint.every_steps=17")
    check_resuming(place, {"unbroken": local, "a": (*local, "train.max_steps=17")}, local)
    assert losses(place / "runs/a")[-1] < losses(place / "runs/a")[0]


def check_resuming(place: Path, cases: on_device.Cases, arguments: tuple[str, ...]) -> None:
    """Runs `cases`, of which ``a`` ends early, and goes on with it by `arguments`: it ends as ``unbroken`` does."""
    for these in (cases, {"a": arguments}):
        on_device.train(these, place, watch="deterministic", processes=2)
    a, unbroken = (result(place / f"runs/{name}") for name in ("a", "unbroken"))
    assert (a["steps"], unbroken["steps"]) == (30, 30)
    assert a["weights_sha256"] == unbroken["weights_sha256"]


@pytest.mark.claim("each process has a context on its own GPU alone")
@pytest.mark.needs(gpus=2, cuda="torch tells only of CUDA's contexts")
def test_each_process_has_a_context_on_its_own_gpu_alone(place: Path):
    modes = ("ddp", "exact", "local")
    cases = {mode: (*FEW, FP32, f"sync.mode={mode}", "optim.ema=0.9", "train.max_steps=6") for mode in modes}
    cases["streamed"] = (*cases["ddp"], "data.in_memory=false", "data.workers=1")
    found = on_device.train(cases, place, watch="contexts", processes=2)
    on_device.only_rehearsed("a simulated device has no contexts")
    for rank, of_rank in enumerate(found):
        assert {name: (of_case["own"], of_case["contexts"]) for name, of_case in of_rank.items()} == {
            name: (rank, [rank]) for name in cases
        }


@pytest.mark.claim("DDP has its gradients as views of its buckets, and each rank's weights are on its own GPU")
def test_gradients_are_views_of_buckets(place: Path):
    found = on_device.train({"a": (*FEW, FP32, "train.max_steps=2")}, place, watch="looks", processes=2)
    assert all(of_rank["a"]["views"] for of_rank in found)
    on_device.only_rehearsed("each process has a simulated device of its own, all with the same number")
    assert [of_rank["a"]["weights on"] for of_rank in found] == [f"{on_device.device_type()}:{rank}" for rank in range(2)]


@pytest.mark.claim("a run on several GPUs ends cleanly: exit code 0, and no warning of torch's or NCCL's")
@pytest.mark.parametrize("mode", ["ddp"] if SIMULATED else ["ddp", "exact", "local"])
def test_a_run_ends_cleanly(place: Path, mode: str):
    options = (*FEW, FP32, f"sync.mode={mode}", "train.max_steps=10")
    env = {"NCCL_DEBUG": "WARN"}
    done = on_device.launch("digitdist.train", *options, "run.name=a", cwd=place, processes=2, env=env)
    assert done.code == 0, done.err
    said = [line for line in (done.out + done.err).splitlines() if "warn" in line.lower() or "destroy_process_group" in line]
    assert not said
