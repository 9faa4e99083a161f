from __future__ import annotations

import pytest
import torch

from digitdist import runtime
from digitdist.config import UserError, load
from digitdist.runtime import World, resolve_precision


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World(0, 1, 0, 1)),
        ({"WORLD_SIZE": "1"}, World(0, 1, 0, 1)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, World(3, 4, 1, 2)),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, World(1, 2, 1, 2)),
    ],
)
def test_the_world_is_the_launchers(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], world: World):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **env}.items():
        monkeypatch.setenv(name, value)
    assert runtime.world() == world


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({"WORLD_SIZE": "2"}, "RANK="),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "contradict"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "contradict"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "srun started 3 copies"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 copies"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "add --multi_gpu"),
    ],
)
def test_a_world_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], part: str):
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", **env}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=part):
        runtime.world()


@pytest.mark.parametrize(
    ("asked", "told", "device", "effective"),
    [
        ("auto", None, "cpu", "fp32"),
        ("auto", "no", "cpu", "fp32"),
        ("auto", "bf16", "cpu", "bf16"),
        ("auto", "fp16", "cpu", "fp32"),
        ("no", "bf16", "cpu", "fp32"),
        ("fp32", "bf16", "cuda", "fp32"),
        ("auto", "no", "cuda", "bf16"),
        ("auto", "fp16", "cuda", "fp16"),
        ("bf16", None, "cuda", "bf16"),
        ("auto", "fp8", "cuda", "bf16"),
    ],
)
def test_precision_is_what_was_asked_or_told_or_best(
    monkeypatch: pytest.MonkeyPatch, asked: str, told: str | None, device: str, effective: str
):
    monkeypatch.setattr(runtime, "_has_bf16", lambda device: True)
    if told:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)
    precision, notes = resolve_precision(asked, device)
    assert precision == effective
    assert bool(notes) == (told in ("fp16", "fp8") and told != effective and asked == "auto")


def test_an_old_gpu_trains_in_fp16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "_has_bf16", lambda device: False)
    assert resolve_precision("auto", "cuda") == ("fp16", ())
    with pytest.raises(UserError, match="bf16"):
        resolve_precision("bf16", "cuda")


@pytest.mark.parametrize("asked", ["fp16", "fp8"])
def test_a_precision_that_a_cpu_has_not_is_refused(asked: str):
    with pytest.raises(UserError, match=f"train.precision={asked} cannot be had.*auto, bf16, fp32"):
        resolve_precision(asked, "cpu")


def in_world(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    values = {"WORLD_SIZE": size, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_two_ranks_of_a_host_may_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch):
    in_world(monkeypatch, 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(runtime, "_accelerator_type", lambda: "cuda")
    monkeypatch.setattr(runtime, "_has_bf16", lambda device: True)
    with pytest.raises(UserError, match="2 processes on this host would share 1 cuda device"):
        runtime.plan(load())
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert runtime.plan(load()).device_type == "cpu"


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    in_world(monkeypatch, 3)
    assert runtime.plan(load()).threads == 2
    assert runtime.plan(load((), ["train.threads=5"])).threads == 5
    assert runtime.plan(load((), ["sync.mode=exact"])).threads == 1
    in_world(monkeypatch, 20)
    assert runtime.plan(load()).threads == 1


def test_mistakes_of_a_launch_are_told_together(monkeypatch: pytest.MonkeyPatch):
    in_world(monkeypatch, 9)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError) as caught:
        runtime.plan(load((), ["sync.mode=exact", "train.precision=fp16"]))
    assert len(caught.value.mistakes) == 3
