from __future__ import annotations

import contextlib

import pytest
import torch

from digitdist.config import ModelConfig, load_config, shipped_configs
from digitdist.distributed import device, plan
from digitdist.distributed.plan import make_plan, resolve_precision
from digitdist.errors import UserError
from digitdist.models import MODELS

CNN, CONVNET = ModelConfig(), ModelConfig(name="convnet")


def has_features(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    """Has torch say that this CPU has these vector instructions, and a cache of so many bytes."""
    known = dict.fromkeys(("avx2", "avx512_f", "avx512_bf16", "amx_bf16"), False) | {"l2_cache_size": 1}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known | dict.fromkeys(features, True), raising=False)


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
    has_features(monkeypatch, "avx512_bf16")
    precision, notes = resolve_precision(requested, device_type, CNN)
    assert precision == effective
    assert bool(notes) == (launcher in ("fp16", "fp8") and launcher != effective and requested == "auto")


def test_an_old_gpu_trains_in_fp16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "has_bf16", lambda device_type: False)
    assert resolve_precision("auto", "cuda", CNN) == ("fp16", ())
    with pytest.raises(UserError, match="bf16"):
        resolve_precision("bf16", "cuda", CNN)


def test_powersgd_which_remembers_an_overflow_is_refused_in_fp16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "lacks", lambda precision, device_type: None)
    assert make_plan(load_config((), ["sync.compress=powersgd", "train.precision=bf16"])).precision == "bf16"
    with pytest.raises(UserError, match=r"sync\.compress=powersgd is not possible in fp16"):
        make_plan(load_config((), ["sync.compress=powersgd", "train.precision=fp16"]))


def test_a_precision_that_a_cpu_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"train\.precision=fp16 is not possible.*auto, bf16, fp32"):
        resolve_precision("fp16", "cpu", CNN)


CPUS = {
    "AVX2": ("avx", "avx2"),
    "AVX-512": ("avx", "avx2", "avx512_f"),
    "AVX-512 with bf16": ("avx2", "avx512_f", "avx512_bf16"),
    "AVX-512 with bf16, AMX": ("avx2", "avx512_f", "avx512_bf16", "amx_bf16"),
    "NEON": ("neon",),
    "NEON with bf16": ("neon", "bf16"),
    "SVE with bf16": ("neon", "sve", "bf16"),
}


@pytest.mark.parametrize("name", CPUS)
def test_a_cpu_computes_in_bf16_only_what_its_instructions_make_faster(monkeypatch: pytest.MonkeyPatch, name: str):
    has_features(monkeypatch, *CPUS[name])
    assert device.describe_instructions() == name
    measured = name.startswith("AVX-512 with bf16")
    assert resolve_precision("auto", "cpu", CONVNET) == ("bf16" if measured else "fp32", ())
    assert resolve_precision("auto", "cpu", CNN) == ("fp32", ())
    assert resolve_precision("auto", "cpu", ModelConfig(name="convnet", target="nets.Own")) == ("fp32", ())
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for requested in ("bf16", "auto"):
        precision, notes = resolve_precision(requested, "cpu", CONVNET)
        assert precision == "bf16"
        if "bf16" in name:
            assert notes == ()
        else:
            (note,) = notes
            assert note.startswith(f"this CPU ({name}) has no bf16 instructions: bf16 takes 7 to 10 times as long")
            assert note.endswith("set train.precision=fp32")


@pytest.mark.parametrize(("features", "name"), [((), "AVX2"), (("avx512_f", "avx512_bf16"), "AVX-512 with bf16")])
def test_an_older_torch_is_asked_in_its_own_way(monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], name: str):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for feature, query in device.OLDER_QUERIES.items():
        answer = feature in ("avx2", *features)
        monkeypatch.setattr(torch.cpu, query, lambda answer=answer: answer, raising=False)
    assert device.describe_instructions() == name
    for query in device.OLDER_QUERIES.values():
        monkeypatch.delattr(torch.cpu, query)
    assert device.cpu_features() == set()
    assert resolve_precision("auto", "cpu", CONVNET) == ("fp32", ())


@pytest.mark.parametrize("recipe", ["fast", "sharp", "best"])
def test_the_recipes_train_in_bf16_only_where_that_is_fast(monkeypatch: pytest.MonkeyPatch, recipe: str):
    config = load_config([recipe])
    assert config.model.name in plan.FASTER_IN_BF16
    for features, precision in (((), "fp32"), (("avx512_bf16",), "bf16")):
        has_features(monkeypatch, *features)
        assert make_plan(config).precision == precision
    assert set(plan.FASTER_IN_BF16) <= set(MODELS)


@pytest.mark.parametrize("name", ["default", "quick"])
def test_the_default_network_trains_in_fp32_on_any_cpu(monkeypatch: pytest.MonkeyPatch, name: str):
    has_features(monkeypatch, "avx512_bf16", "amx_bf16")
    assert make_plan(load_config([str(shipped_configs()[name])])).precision == "fp32"


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


def test_each_rank_asks_its_own_gpu(monkeypatch: pytest.MonkeyPatch):
    """Or each would open a context on the first one."""
    in_world(monkeypatch, 2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    asked: list[str] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(plan, "accelerator_type", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: asked.append(f"set {index}"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: asked.append("bf16") or True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: asked.append("capability") or (9, 0))
    assert make_plan(load_config((), ["train.compile=default"])).precision == "bf16"
    assert asked == ["set 1", "capability", "bf16"]


def test_powersgd_on_the_cpus_of_a_host_with_gpus_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Its hook in torch waits for the GPU, whatever the device."""
    in_world(monkeypatch, 2)
    assert make_plan(load_config((), ["sync.compress=powersgd"])).device_type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="hide them with CUDA_VISIBLE_DEVICES="):
        make_plan(load_config((), ["sync.compress=powersgd"]))


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(plan, "cpu_quota", lambda: None)
    in_world(monkeypatch, 3)
    assert make_plan(load_config()).threads == 2
    assert make_plan(load_config((), ["train.threads=5"])).threads == 5
    assert make_plan(load_config((), ["sync.mode=exact"])).threads == 1
    monkeypatch.setattr(plan, "cpu_quota", lambda: 6.5)
    assert (make_plan(load_config()).threads, make_plan(load_config()).cpu_quota) == (2, 6.5)
    monkeypatch.setattr(plan, "cpu_quota", lambda: 5.5)
    assert make_plan(load_config()).threads == 1
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


@pytest.mark.parametrize(
    ("device_type", "capability", "compiler", "message"),
    [
        ("cpu", (9, 0), "CXX", "needs a C\\+\\+ compiler on cpu, and there is no not-there"),
        ("cuda", (9, 0), "CC", "needs a C compiler on cuda, and there is no not-there"),
        ("cuda", (6, 1), None, r"compute capability 7\.0 or more, and this one has 6\.1"),
        ("cuda", (7, 0), None, None),
    ],
)
def test_what_compiling_needs_is_checked_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, device_type: str, capability: tuple[int, int], compiler: str | None, message: str | None
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: device_type != "cpu")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(plan, "accelerator_type", lambda: device_type)
    monkeypatch.setattr(device, "has_bf16", lambda device_type: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(plan.shutil, "which", lambda name: None if name == "not-there" else f"/usr/bin/{name}")
    if compiler:
        monkeypatch.setenv(compiler, "not-there")
    expected = pytest.raises(UserError, match=message) if message else contextlib.nullcontext()
    with expected:
        make_plan(load_config((), ["train.compile=default"]))
