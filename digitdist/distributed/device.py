"""What is known of the device that a process runs on, without changing anything on it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

import torch
from accelerate.utils import is_bf16_available

X86_BF16 = {"avx512_bf16", "amx_bf16"}  # the instructions, each enough by itself
VECTORS = {"avx512_f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "neon": "NEON"}  # best first
OLDER_QUERIES = {  # of a torch without `torch.cpu.get_capabilities`
    "avx2": "_is_avx2_supported",
    "avx512_f": "_is_avx512_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "amx_bf16": "_is_amx_tile_supported",
}


def accelerator_type() -> str:
    """The type of this host's accelerator, such as ``cuda``; ``cpu`` where there is none."""
    device = torch.accelerator.current_accelerator()
    return device.type if device else "cpu"


def lacks(precision: str, device_type: str) -> str | None:
    """Why `precision`, as a launcher may name it, is not possible on a device of this type; None where it is."""
    if precision == "bf16" and device_type != "cpu" and not has_bf16(device_type):
        return f"this {device_type} device has no bf16"
    if precision == "fp16" and device_type not in ("cuda", "xpu"):
        return f"fp16 autocast does nothing on {device_type}"
    if precision == "fp8":
        return "fp8 is not supported"
    return None


def has_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_bf16_available(ignore_tpu=True)


def cpu_features() -> set[str]:
    """The vector instructions of this CPU, as `torch.cpu.get_capabilities` names them; none where torch cannot tell."""
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    return {name for name, query in OLDER_QUERIES.items() if getattr(torch.cpu, query, bool)()}


def describe_instructions() -> str:
    """The best vector instructions of this CPU, such as ``AVX2``, ``AVX-512 with bf16, AMX`` or ``NEON``."""
    features = cpu_features()
    name = next((name for feature, name in VECTORS.items() if feature in features), platform.machine())
    with_bf16 = " with bf16" if features & {"avx512_bf16", "bf16"} else ""  # `bf16` is ARM's
    return f"{name}{with_bf16}{', AMX' if 'amx_bf16' in features else ''}"


def num_cores(quota: float | None) -> int:
    """The whole CPU cores that this process may use, at least 1: as affinity and a quota of so many CPUs allow."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13, which its user may tell another number
        cores = os.process_cpu_count() or 1
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if quota is None else max(1, min(cores, int(quota)))


def device_name(device_type: str) -> str:
    """The maker's name for this process's device of type `device_type`."""
    if device_type == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        except OSError:  # another system, or one that hides it
            lines = []
        return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    tell = getattr(torch.get_device_module(device_type), "get_device_name", platform.machine)  # MPS and the CPU have none
    return tell()


def peak_memory_mb(device: torch.device) -> dict[str, float | None]:
    """The most memory in MiB that this process has used so far: of its host, and of its device where that has its own."""
    measure = getattr(torch.get_device_module(device), "max_memory_allocated", None)  # MPS and the CPU have none
    used = {"host": _host_peak_bytes(), "device": measure(device) if measure else None}
    return {name: None if size is None else round(size / 2**20, 1) for name, size in used.items()}


def _host_peak_bytes() -> int | None:
    """The most memory that this process has used; None where Linux's kernel tells none, as gVisor's."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:  # not ru_maxrss, which starts from what the parent process used
        lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def takes_pinned_memory(device: torch.device) -> bool:
    """Whether a copy from pinned memory to `device` does not make the host wait. To MPS it must: there torch may read memory
    that has been freed meanwhile (pytorch#189690)."""
    return device.type not in ("cpu", "mps")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, which is on the CPU, on `device`, without the host waiting for it where that can be."""
    return tensor.pin_memory().to(device, non_blocking=True) if takes_pinned_memory(device) else tensor.to(device)
