from __future__ import annotations

import pytest
import torch

from digitdist.config import load_config
from digitdist.distributed import device, plan
from digitdist.distributed.plan import make_plan, resolve_precision
from digitdist.errors import UserError


@pytest.mark.parametrize(
    ("requested", "launcher", "device_type", "effective"),
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
def test_precision_is_what_was_requested_or_the_launcher_says_or_the_best(
    monkeypatch: pytest.MonkeyPatch, requested: str, launcher: str | None, device_type: str, effective: str
):
    monkeypatch.setattr(device, "has_bf16", lambda device_type: True)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    precision, notes = resolve_precision(requested, device_type)
    assert precision == effective
    assert bool(notes) == (launcher in ("fp16", "fp8") and launcher != effective and requested == "auto")


def test_an_old_gpu_trains_in_fp16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "has_bf16", lambda device_type: False)
    assert resolve_precision("auto", "cuda") == ("fp16", ())
    with pytest.raises(UserError, match="bf16"):
        resolve_precision("bf16", "cuda")


@pytest.mark.parametrize("requested", ["fp16", "fp8"])
def test_a_precision_that_a_cpu_does_not_have_is_refused(requested: str):
    with pytest.raises(UserError, match=f"train.precision={requested} is not possible.*auto, bf16, fp32"):
        resolve_precision(requested, "cpu")


def in_world(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    values = {"WORLD_SIZE": size, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_two_ranks_of_a_host_may_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch):
    in_world(monkeypatch, 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(plan, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(device, "has_bf16", lambda device_type: True)
    with pytest.raises(UserError, match="2 processes on this host would share 1 cuda device"):
        make_plan(load_config())
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert make_plan(load_config()).device_type == "cpu"


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    in_world(monkeypatch, 3)
    assert make_plan(load_config()).threads == 2
    assert make_plan(load_config((), ["train.threads=5"])).threads == 5
    assert make_plan(load_config((), ["sync.mode=exact"])).threads == 1
    in_world(monkeypatch, 20)
    assert make_plan(load_config()).threads == 1


def test_batchnorm_over_ranks_needs_cuda_and_the_way_out_is_named():
    with pytest.raises(UserError, match=r"needs CUDA; set it to false, or set sync\.mode=exact"):
        make_plan(load_config((), ["sync.batch_norm=true"]))


def test_mistakes_of_a_launch_are_reported_together(monkeypatch: pytest.MonkeyPatch):
    in_world(monkeypatch, 9)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError) as caught:
        make_plan(load_config((), ["sync.mode=exact", "train.precision=fp16"]))
    assert len(caught.value.mistakes) == 3
