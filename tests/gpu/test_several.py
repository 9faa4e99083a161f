"""Two GPUs or more: what `exact`, `ddp` and `local` promise of each other on any number of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import on_device
from helpers.on_device import BEST, EVERYTHING, EXACT, FEW, FP32, PRECISIONS, SIMULATED, Group, Worlds, skip_without
from helpers.runs import assert_same_run, losses, result

from digitdist.checkpoint import folders, read

pytestmark = [pytest.mark.gpu, pytest.mark.needs(gpus=2), pytest.mark.timeout(900)]
MOST = max(2, min(on_device.num_devices(), 7))  # the largest world that is tried
# Shards of 7 or 8 images of 50, and 1 or 2 in the last batch of an epoch: no number of ranks divides them.
UNEVEN = (*EXACT, *EVERYTHING, "train.accumulate=1", "sync.shards=7", "sync.check_every=5", "train.log_every=1", BEST)
SMOOTH = (*FEW, "model.target=helpers.networks.Smooth", "train.log_every=1", "train.eval_every=0", "sync.check_every=1")
STEPS = 20 if SIMULATED else 100  # of a comparison of losses
COMPRESSIONS = ["bf16"] if SIMULATED else ["bf16", "fp16", "powersgd"]
OVERLAPS = ["true"] if SIMULATED else ["false", "true"]
LOCAL = (*FEW, FP32, "model.name=convnet", "optim.ema=0.9", "sync.mode=local", "sync.every=5", "sync.check_every=1")
# bf16 has 8 bits of a number and fp16 11, which kernels for other batch sizes may round otherwise.
TOLERANCES = {FP32: 1e-5, "train.precision=bf16": 3e-2, "train.precision=fp16": 4e-3}
WITHOUT_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}


def in_two_parts(name: str, *arguments: str) -> Group:
    """A run of 18 steps, and one that is resumed after the 12th, with kernels that give the same bits each time."""
    options = (*arguments, "train.max_steps=18", "checkpoint.every_steps=12")
    first = (*options, "train.max_steps=12", f"run.name={name}")
    return Group({f"{name}, unbroken": options, f"{name}, first part": first, name: options}, watch="deterministic")


def groups() -> dict[str, dict[int, Group]]:
    """All trainings here, by the name of a group and the world size."""
    sizes = range(1, MOST + 1)
    found: dict[str, dict[int, Group]] = {
        "exact": {size: Group({f"exact on {size}": UNEVEN}) for size in sizes},
        "first part": {MOST: Group({"first part": (*UNEVEN, "train.max_steps=13", "run.name=resumed")})},
        "resumed": {1: Group({"resumed": UNEVEN})},
        "views": {2: Group({"views": (*FEW, FP32, "train.max_steps=2")}, watch="looks")},
    }
    for precision in PRECISIONS:
        options = (*SMOOTH, precision, f"train.max_steps={STEPS}")
        found[precision] = {size: Group({f"{precision} on {size}": options}, env=WITHOUT_TF32) for size in sizes}
    if not SIMULATED:
        options = (*FEW, FP32, "model.name=convnet", "sync.batch_norm=true", "train.log_every=1", "train.max_steps=20")
        cases = {size: {f"BatchNorm on {size}": (*options, "data.args.count=600")} for size in (1, 2)}
        found["BatchNorm"] = {size: Group(of_size, env=WITHOUT_TF32) for size, of_size in cases.items()}
    for compress in COMPRESSIONS:
        parts = in_two_parts(compress, *SMOOTH, FP32, f"sync.compress={compress}")
        found[compress] = {2: Group({**parts.cases, f"{compress}, whole": (*SMOOTH, FP32, "train.max_steps=1")}, parts.watch)}
    for overlap in OVERLAPS:
        name = f"local, overlap {overlap}"
        found[name] = {2: in_two_parts(name, *LOCAL, f"sync.overlap={overlap}")}
    return found | {"contexts": {2: Group(cases_of_contexts(), watch="contexts")}}


def cases_of_contexts() -> dict[str, tuple[str, ...]]:
    short = (*FEW, FP32, "optim.ema=0.9", "train.max_steps=6")
    own = {"ddp": ()}
    if not SIMULATED:
        own |= {"exact": ("sync.mode=exact",), "local": ("sync.mode=local", "sync.every=2")}
        own["streamed"] = ("data.in_memory=false", "data.workers=1")
    return {f"contexts, {name}": (*short, *of_name) for name, of_name in own.items()}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory, mnist_root: Path) -> Worlds:
    place = tmp_path_factory.mktemp("worlds")
    (place / "data").symlink_to(mnist_root)
    return Worlds(place, groups())


@pytest.mark.claim("exact: the same bits on 1, 2, … GPUs, with uneven shards and short last batches")
def test_an_exact_run_is_the_same_run_on_any_number_of_gpus(worlds: Worlds):
    for size in range(1, MOST + 1):
        worlds.found("exact", size)
        assert result(worlds.runs / f"exact on {size}")["world_size"] == size
        assert_same_run(worlds.runs / f"exact on {size}", worlds.runs / "exact on 1")


@pytest.mark.claim("exact: a run that is resumed on another number of GPUs ends with the same bits")
def test_an_exact_run_is_resumed_on_another_number_of_gpus(worlds: Worlds):
    worlds.found("exact", MOST)
    worlds.found("first part", MOST)
    worlds.found("resumed", 1)
    stored = [read(folder) for folder in folders(worlds.runs / "resumed/checkpoints")]
    assert [(one.step, one.state["world_size"]) for one in stored] == [(10, MOST), (13, MOST), (20, 1)]
    assert_same_run(worlds.runs / "resumed", worlds.runs / f"exact on {MOST}")


@pytest.mark.claim("ddp: without dropout and BatchNorm the losses of several GPUs are those of one, to rounding")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_losses_of_several_gpus_are_those_of_one(worlds: Worlds, report: on_device.Report, precision: str):
    skip_without(precision)
    sizes = sorted(worlds.groups[precision])
    for size in sizes:
        worlds.found(precision, size)
    one, *others = (np.array(losses(worlds.runs / f"{precision} on {size}")) for size in sizes)
    assert len(one) == STEPS
    difference = max(np.abs(one - other).max() for other in others)
    report(f"{precision.partition('=')[2]}: the largest difference in {STEPS} steps is {difference:.1e}")
    assert difference < TOLERANCES[precision]


@pytest.mark.claim("sync.batch_norm: with BatchNorm too the losses of several GPUs are those of one, to rounding")
@pytest.mark.needs(gpus=2, cuda="torch's SyncBatchNorm takes no other")
def test_with_synchronised_batchnorm_the_losses_are_those_of_one(worlds: Worlds):
    on_device.only_rehearsed("torch's SyncBatchNorm needs CUDA")
    for size in (1, 2):
        worlds.found("BatchNorm", size)
    one, two = (np.array(losses(worlds.runs / f"BatchNorm on {size}")) for size in (1, 2))
    assert len(one) == len(two) == 20
    assert np.abs(one - two).max() < 1e-3


@pytest.mark.claim(
    "compressed ddp: ranks are equal, the first loss is not rounded, and a resumed run has the unbroken one's bits"
)
@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_compressed_run_is_resumed_without_a_trace(worlds: Worlds, compress: str):
    worlds.found(compress, 2)
    assert_resumed_without_a_trace(worlds, compress)
    assert result(worlds.runs / f"{compress}, whole")["steps"] == 1
    first, whole = (losses(worlds.runs / name)[0] for name in (f"{compress}, unbroken", f"{compress}, whole"))
    assert first == pytest.approx(whole, rel=1e-6)


@pytest.mark.claim("local, with and without sync.overlap: ranks are equal, and a resumed run has the unbroken one's bits")
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_local_run_is_resumed_without_a_trace(worlds: Worlds, overlap: str):
    worlds.found(f"local, overlap {overlap}", 2)
    assert_resumed_without_a_trace(worlds, f"local, overlap {overlap}")


def assert_resumed_without_a_trace(worlds: Worlds, name: str) -> None:
    """Each comparison of the ranks' weights, after every step or round, is one that the trainer makes."""
    parts, unbroken = worlds.runs / name, worlds.runs / f"{name}, unbroken"
    assert [read(folder).step for folder in folders(parts / "checkpoints")] == [12, 18]
    assert result(parts)["weights_sha256"] == result(unbroken)["weights_sha256"]
    assert losses(unbroken)[-1] < losses(unbroken)[0]


@pytest.mark.claim("each process has a context on its own GPU alone")
@pytest.mark.needs(gpus=2, cuda="torch tells only of CUDA's contexts")
def test_each_process_has_a_context_on_its_own_gpu_alone(worlds: Worlds):
    for rank, found in enumerate(worlds.found("contexts", 2)):
        assert found.keys() == cases_of_contexts().keys()
        if not SIMULATED:
            assert {name: (case["own"], case["contexts"]) for name, case in found.items()} == dict.fromkeys(
                found, (rank, [rank])
            )
    on_device.only_rehearsed("a simulated device has no contexts")


@pytest.mark.claim("DDP has its gradients as views of its buckets, and each rank's weights are on its own GPU")
def test_gradients_are_views_of_buckets(worlds: Worlds):
    found = [of_rank["views"] for of_rank in worlds.found("views", 2)]
    assert all(looks["views"] for looks in found)
    on_device.only_rehearsed("each process has a simulated device of its own, all of one number")
    assert [looks["weights on"] for looks in found] == [f"{on_device.device_type()}:{rank}" for rank in range(2)]


@pytest.mark.claim("a run on several GPUs ends cleanly: exit code 0, and no warning of torch's or NCCL's")
@pytest.mark.parametrize("mode", ["ddp"] if SIMULATED else ["ddp", "exact", "local"])
def test_a_run_ends_cleanly(place: Path, mode: str):
    options = (*FEW, FP32, f"sync.mode={mode}", "train.max_steps=10")
    done = on_device.launch("digitdist.train", *options, cwd=place, processes=2, env={"NCCL_DEBUG": "WARN"})
    assert done.code == 0, done.err
    said = (done.out + done.err).splitlines()
    assert any("next: python -m digitdist.evaluate" in line for line in said)
    warnings = [line for line in said if "warn" in line.lower() or "destroy_process_group" in line]
    assert not [line for line in warnings if not (SIMULATED and "Time stats are currently only collected for" in line)]
