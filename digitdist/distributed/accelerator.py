"""Builds the `Accelerator`, and prepares a network with it."""

from __future__ import annotations

import ipaddress
import os
import socket
import warnings
from contextlib import AbstractContextManager
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, check_cuda_p2p_ib_support
from torch import nn

from digitdist.config import Config
from digitdist.distributed.launcher import PSUTIL_ERRORS
from digitdist.distributed.plan import Plan
from digitdist.distributed.process import note_process_group
from digitdist.distributed.shortcuts import keep_freed_memory, use_deterministic_algorithms
from digitdist.errors import UserError

ELSEWHERE = "192.0.2.1"  # an address that no host has, by RFC 5737: the way to it is the default route
NCCL_LONGER_S = 60.0  # than sync.timeout_s


def start_accelerator(config: Config, plan: Plan) -> Accelerator:
    """Builds the `Accelerator`. Collective: every rank must call it; it makes the process group.

    Raises:
        UserError: Accelerate sees another number of processes than the launcher started.
    """
    keep_freed_memory()
    if plan.world.several_hosts:
        _choose_network_interface(os.environ["MASTER_ADDR"])
    if plan.device_type == "cuda" and plan.world.size > 1 and not check_cuda_p2p_ib_support():
        # Cards such as RTX 4090 with an old driver; `accelerate launch` sets it itself, and under torchrun Accelerate raises.
        os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "NO"
    if plan.world.size == 1 and not os.environ.get("MASTER_ADDR"):
        os.environ.pop("LOCAL_RANK", None)  # by which alone Accelerate would look for other ranks
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads))  # Accelerate warns where it is not set
    # Accelerate passes DistributedDataParallel an argument that has a new name.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    if config.sync.mode == "exact":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # NCCL ends the process when its time is over, without a name; `PeerWatch` is to be first.
    extra_s = 0 if plan.device_type == "cpu" else NCCL_LONGER_S
    accelerator = Accelerator(
        cpu=plan.cpu,
        mixed_precision="no" if plan.precision == "fp32" else plan.precision,
        # Set explicitly, since Accelerate would otherwise read it from the environment and divide the loss by it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # A step may have fewer images than ranks, and no image is repeated to make the shares even. Streamed images are pinned.
        dataloader_config=DataLoaderConfiguration(even_batches=False, non_blocking=True),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.sync.timeout_s + extra_s)),
            # Buffers matter only in evaluations and checkpoints, and rank 0's are sent to all ranks before those. No static
            # graph: a network may have another one in each step.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if plan.world.size > 1:
        note_process_group()
    torch.set_num_threads(plan.threads)  # after Accelerate, which sets its own
    if plan.device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 in linear layers too, as in convolutions
    if accelerator.num_processes != plan.world.size:
        raise UserError(
            f"the launcher started {plan.world.size} processes, Accelerate sees {accelerator.num_processes};"
            " start with torchrun or accelerate launch --multi_gpu"
        )
    return accelerator


def prepare_module(accelerator: Accelerator, module: nn.Module, data_parallel: bool) -> nn.Module:
    """`module` on the device, as Accelerate prepares it: with `data_parallel`, in `DistributedDataParallel` where there are
    several ranks. Collective then: every rank must call it.

    On CPUs without `DistributedDataParallel` there is nothing to prepare; Accelerate's look for DTensor parameters would
    import 0.8 s of torch for it.
    """
    data_parallel = data_parallel and accelerator.num_processes > 1
    if not data_parallel and accelerator.device.type == "cpu":
        return module
    return accelerator.prepare_model(module, evaluation_mode=not data_parallel)


def autocast(accelerator: Accelerator, precision: str | None = None) -> AbstractContextManager[None]:
    """A context that computes in `precision` (fp32, bf16 or fp16), by default in the accelerator's: it has only one, and the
    runs of an ensemble may differ in theirs."""
    own = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    if precision in (None, own):
        return accelerator.autocast()
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(accelerator.device.type, dtype, enabled=precision != "fp32")


def _choose_network_interface(address: str) -> None:
    """Tells gloo the network interface by which `address` is reached, unless the user has chosen one.

    gloo itself takes the interface of the host's own name, and hangs where other hosts cannot reach that, such as with Debian's
    line ``127.0.1.1 NAME`` in ``/etc/hosts``; nor does the name of the first host lead anywhere else on that host itself.
    """
    try:
        addresses = [(name, entry.address) for name, entries in psutil.net_if_addrs().items() for entry in entries]
    except PSUTIL_ERRORS:  # a system that does not tell
        return
    outer = [(name, own) for name, own in addresses if not _is_loopback(own)]
    for target in (address, ELSEWHERE):
        for name, own in outer:
            if own == _source_address(target):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if _is_loopback(_source_address(address)) and outer:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", outer[0][0])


def _is_loopback(address: str) -> bool:
    """Also for what is no address of the Internet's, such as a network card's."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return True


def _source_address(target: str) -> str:
    """This host's own address on the way to `target`; none where no way is known."""
    try:
        family, _, _, _, to = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(to)  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return ""
