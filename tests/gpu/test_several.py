"""Two GPUs or more: what `exact`, `ddp` and `local` promise of each other on any number of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import on_device
from helpers.on_device import FP32, PRECISIONS, SIMULATED, Trainings, skip_without
from helpers.runs import assert_same_run, losses, result
from helpers.trainings import COMPARED, COMPRESSIONS, END, MIDDLE, MOST, OVERLAPS, SHORT

from digitdist.checkpoint import folders, read

pytestmark = [pytest.mark.gpu, pytest.mark.needs(gpus=2), pytest.mark.timeout(900)]
# bf16 has 8 bits of a number and fp16 11, which kernels for other batch sizes may round otherwise.
TOLERANCES = {FP32: 1e-5, "train.precision=bf16": 3e-2, "train.precision=fp16": 4e-3}


@pytest.mark.claim("exact: the same bits on 1, 2, … GPUs, with uneven shards and short last batches")
def test_an_exact_run_is_the_same_run_on_any_number_of_gpus(trainings: Trainings):
    for size in range(1, MOST + 1):
        trainings.found("uneven", size)
        assert result(trainings.runs / f"exact on {size}")["world_size"] == size
        assert_same_run(trainings.runs / f"exact on {size}", trainings.runs / "exact on 1")


@pytest.mark.claim("exact: a run that is resumed on another number of GPUs ends with the same bits")
def test_an_exact_run_is_resumed_on_another_number_of_gpus(trainings: Trainings):
    trainings.found("uneven", MOST)
    trainings.found("first part", MOST)
    trainings.found("resumed", 1)
    stored = [read(folder) for folder in folders(trainings.runs / "resumed/checkpoints")]
    assert [(one.step, one.state["world_size"]) for one in stored] == [(10, MOST), (13, MOST), (16, 1)]
    assert_same_run(trainings.runs / "resumed", trainings.runs / f"exact on {MOST}")


@pytest.mark.claim("ddp: without dropout and BatchNorm the losses of several GPUs are those of one, to rounding")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_losses_of_several_gpus_are_those_of_one(trainings: Trainings, report: on_device.Report, precision: str):
    skip_without(precision)
    sizes = sorted(trainings.groups[precision])
    for size in sizes:
        trainings.found(precision, size)
    one, *others = (np.array(losses(trainings.runs / f"{precision} on {size}")) for size in sizes)
    assert len(one) == COMPARED
    difference = max(np.abs(one - other).max() for other in others)
    report(f"{precision.partition('=')[2]}: the largest difference in {COMPARED} steps is {difference:.1e}")
    assert difference < TOLERANCES[precision]


@pytest.mark.claim("sync.batch_norm: with BatchNorm too the losses of several GPUs are those of one, to rounding")
@pytest.mark.needs(gpus=2, cuda="torch's SyncBatchNorm takes no other")
def test_with_synchronised_batchnorm_the_losses_are_those_of_one(trainings: Trainings):
    on_device.only_rehearsed("torch's SyncBatchNorm needs CUDA")
    for size in (1, 2):
        trainings.found("BatchNorm", size)
    one, two = (np.array(losses(trainings.runs / f"BatchNorm on {size}")) for size in (1, 2))
    assert len(one) == len(two) == 20
    assert np.abs(one - two).max() < 1e-3


@pytest.mark.claim(
    "compressed ddp: ranks are equal, the first loss is not rounded, and a resumed run has the unbroken one's bits"
)
@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_compressed_run_is_resumed_without_a_trace(trainings: Trainings, compress: str):
    trainings.found(compress, 2)
    assert_resumed_without_a_trace(trainings, compress)
    assert result(trainings.runs / f"{compress}, whole")["steps"] == 1
    first, whole = (losses(trainings.runs / name)[0] for name in (f"{compress}, unbroken", f"{compress}, whole"))
    assert first == pytest.approx(whole, rel=1e-6)


@pytest.mark.claim("local, with and without sync.overlap: ranks are equal, and a resumed run has the unbroken one's bits")
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_local_run_is_resumed_without_a_trace(trainings: Trainings, overlap: str):
    trainings.found(f"local, overlap {overlap}", 2)
    assert_resumed_without_a_trace(trainings, f"local, overlap {overlap}")


def assert_resumed_without_a_trace(trainings: Trainings, name: str) -> None:
    """Each comparison of the ranks' weights, after every step or round, is one that the trainer makes."""
    parts, unbroken = trainings.runs / name, trainings.runs / f"{name}, unbroken"
    assert [read(folder).step for folder in folders(parts / "checkpoints")] == [MIDDLE, END]
    assert result(parts)["weights_sha256"] == result(unbroken)["weights_sha256"]
    assert losses(unbroken)[-1] < losses(unbroken)[0]


@pytest.mark.claim("each process has a context on its own GPU alone")
@pytest.mark.needs(gpus=2, cuda="torch tells only of CUDA's contexts")
def test_each_process_has_a_context_on_its_own_gpu_alone(trainings: Trainings):
    for rank, found in enumerate(trainings.found("contexts", 2)):
        assert len(found) == len(SHORT)
        if not SIMULATED:
            assert {name: (case["own"], case["contexts"]) for name, case in found.items()} == dict.fromkeys(
                found, (rank, [rank])
            )
    on_device.only_rehearsed("a simulated device has no contexts")


@pytest.mark.claim("DDP has its gradients as views of its buckets, and each rank's weights are on its own GPU")
def test_gradients_are_views_of_buckets(trainings: Trainings):
    found = [of_rank["views"] for of_rank in trainings.found("views", 2)]
    assert all(looks["views"] for looks in found)
    on_device.only_rehearsed("each process has a simulated device of its own, all of one number")
    assert [looks["weights on"] for looks in found] == [f"{on_device.device_type()}:{rank}" for rank in range(2)]


@pytest.mark.claim("a run on several GPUs ends cleanly: exit code 0, and no warning of torch's or NCCL's")
@pytest.mark.parametrize("name", SHORT)
def test_a_run_ends_cleanly(trainings: Trainings, name: str):
    trainings.found(f"{name} alone", 2)
    said = trainings.said[f"{name} alone", 2]
    assert any("next: python -m digitdist.evaluate" in line for line in said)
    warnings = [line for line in said if re.search(r"\bwarn|\[W\d|destroy_process_group", line, re.IGNORECASE)]
    assert not [line for line in warnings if not (SIMULATED and "Time stats are currently only collected for" in line)]
