"""What a process will run on, decided from configuration and environment before anything is started."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch

from digitdist.config import Config, ModelConfig
from digitdist.distributed.device import X86_BF16, accelerator_type, cpu_features, describe_instructions, lacks, num_cores
from digitdist.distributed.launcher import default_launch_config
from digitdist.distributed.quotas import cpu_quota
from digitdist.errors import UserError
from digitdist.world import World, environment_flag, read_world

PRECISIONS = ("bf16", "fp16", "fp32")  # best first, on a GPU
COMPILES_FROM = (7, 0)  # compute capability, below which Triton makes no code
# The networks that bf16 makes faster on CPUs with x86's instructions for it: the recipes take half the time on Zen 4 and 5.
# The default network gains nothing there at batch 100; other networks, and ARM, are not measured.
FASTER_IN_BF16 = ("convnet", "columns")
UNSUPPORTED_PLUGINS = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")


@dataclass(frozen=True)
class Plan:
    """World, device, effective precision (fp32, bf16 or fp16) and threads of a process; `notes` are lines to print.

    `cpu_quota`: the CPUs that a container allows all processes together; None where it does not limit them.
    """

    world: World
    cpu: bool
    device_type: str
    precision: str
    threads: int
    notes: tuple[str, ...]
    cpu_quota: float | None = None


def planned_device() -> str:
    """The type of the device that a process will run on."""
    cpu = not torch.accelerator.is_available() or environment_flag("ACCELERATE_USE_CPU")
    return "cpu" if cpu else accelerator_type()


def make_plan(config: Config) -> Plan:
    """Decides device, precision and threads.

    Raises:
        UserError: with every mistake of the launch, and everything that was asked of this device and is not possible.
    """
    world = read_world()
    device_type = planned_device()
    cpu = device_type == "cpu"
    if device_type != "cpu" and 1 < world.local_size <= torch.accelerator.device_count():
        # Before anything is asked of a device: or each rank would open a context on the first one.
        torch.get_device_module(device_type).set_device(world.local_rank)
    mistakes = _launch_mistakes(config, world, device_type)
    precision, notes = "fp32", tuple[str, ...]()
    try:
        precision, notes = resolve_precision(config.train.precision, device_type, config.model)
    except UserError as error:
        mistakes += error.mistakes
    if precision == "fp16" and config.sync.compress == "powersgd":
        mistakes.append(
            "sync.compress=powersgd is not possible in fp16: what it rounds off it adds to the next gradient, so one that"
            " overflows spoils all that follow; set train.precision=bf16 or fp32, or sync.compress=fp16"
        )
    if mistakes:
        raise UserError(*mistakes)
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        notes += ("accelerate launch asked for a dynamo backend, which is not used; train.compile=default compiles",)
    default = default_launch_config()
    if default:
        notes += (f"launcher   {default}",)
    quota = cpu_quota()
    threads = 1 if config.sync.mode == "exact" else max(1, num_cores(quota) // world.local_size)
    return Plan(world, cpu, device_type, precision, config.train.threads or threads, notes, quota)


def _launch_mistakes(config: Config, world: World, device_type: str) -> list[str]:
    mistakes = []
    if device_type != "cpu" and world.local_size > torch.accelerator.device_count():
        mistakes.append(
            f"{world.local_size} processes on this host would share {torch.accelerator.device_count()} {device_type} device(s);"
            " start at most one process per device, or set ACCELERATE_USE_CPU=true to train on CPUs"
        )
    mistakes += [
        f"accelerate launch asked for {name}, which is not supported; launch without it"
        for name in UNSUPPORTED_PLUGINS
        if environment_flag(f"ACCELERATE_USE_{name}")
    ]
    if config.sync.mode == "exact" and world.size > config.sync.shards:
        mistakes.append(
            f"sync.mode=exact takes at most sync.shards={config.sync.shards} processes, {world.size} were started;"
            f" start fewer, or set sync.shards={world.size} (another number of shards gives other bits)"
        )
    if config.sync.batch_norm and config.sync.mode == "ddp" and device_type != "cuda":
        mistakes.append(
            f"sync.batch_norm=true is not possible on {device_type}: torch's SyncBatchNorm needs CUDA; set it to false, or set"
            " sync.mode=exact, where BatchNorm's statistics do not depend on the world size"
        )
    if config.sync.compress == "powersgd" and world.size > 1 and device_type == "cpu" and torch.cuda.is_available():
        mistakes.append(
            "sync.compress=powersgd is not possible on the CPUs of a host with GPUs, for which torch's hook waits; hide them"
            " with CUDA_VISIBLE_DEVICES=, or choose another value"
        )
    if config.train.compile != "none":
        mistakes += [
            f"train.compile={config.train.compile} is not possible: {reason}, or set train.compile=none"
            for reason in _compiling_lacks(device_type)
        ]
    return mistakes


def _compiling_lacks(device_type: str) -> list[str]:
    """What torch.compile lacks to make code for this device, each with the way out: Triton builds its launchers in C."""
    language, variable, default = ("C++", "CXX", "g++") if device_type == "cpu" else ("C", "CC", "gcc")
    compiler = os.environ.get(variable, default)
    lacking = []
    if not shutil.which(compiler):
        lacking.append(
            f"it needs a {language} compiler on {device_type}, and there is no {compiler}; install one, name it in {variable}"
        )
    if device_type == "cuda" and torch.cuda.get_device_capability() < COMPILES_FROM:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        lacking.append(f"it needs a GPU of compute capability 7.0 or more, and this one has {found}; use another")
    return lacking


def resolve_precision(requested: str, device_type: str, model: ModelConfig) -> tuple[str, tuple[str, ...]]:
    """The effective precision (fp32, bf16 or fp16) for a network, and what to print about it.

    `auto` takes what `accelerate launch` was told (it sets ``no`` when it was told nothing, so ``no`` counts as nothing),
    else the fastest that the device itself computes.

    Raises:
        UserError: the requested precision is not possible on this device.
    """
    if requested == "no":
        requested = "fp32"
    if requested != "auto":
        reason = lacks(requested, device_type)
        if reason:
            possible = ", ".join(name for name in PRECISIONS if not lacks(name, device_type))
            raise UserError(f"train.precision={requested} is not possible: {reason}; here it takes auto, {possible}")
        return requested, _slowness(requested, device_type)
    best = _fastest(device_type, model)
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in (*PRECISIONS, "fp8"):
        return best, ()
    reason = lacks(launcher, device_type)
    if reason:
        return best, (f"accelerate launch asked for {launcher}: {reason}; training uses {best}",)
    return launcher, _slowness(launcher, device_type)


def _fastest(device_type: str, model: ModelConfig) -> str:
    """The fastest precision for a network on a device, among those that it has instructions for."""
    if device_type != "cpu":
        return next(name for name in PRECISIONS if not lacks(name, device_type))
    gains = model.target is None and model.name in FASTER_IN_BF16
    return "bf16" if gains and X86_BF16 & cpu_features() else "fp32"


def _slowness(precision: str, device_type: str) -> tuple[str, ...]:
    """A line where a CPU has no instructions for `precision`."""
    if device_type != "cpu" or precision != "bf16" or cpu_features() & {*X86_BF16, "bf16"}:
        return ()
    return (
        f"this CPU ({describe_instructions()}) has no bf16 instructions: bf16 takes 7 to 10 times as long as fp32"
        " (measured with AVX2); set train.precision=fp32",
    )
