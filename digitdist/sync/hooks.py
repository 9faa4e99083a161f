"""How `DistributedDataParallel` sends its gradients: PyTorch's own compression."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

POWERSGD_RANK = 2
POWERSGD_START = 10  # steps that are sent whole before
POWERSGD_MEMORY = ("error", "p_memory", "q_memory")  # a PowerSGDState has NAME_dict: number of a bucket to tensor


def register_hook(model: DistributedDataParallel, compress: str) -> PowerSGDState | None:
    """Registers the communication hook of `sync.compress`; returns the state of PowerSGD, if that is used.

    PowerSGD (Vogels et al., PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization, 2019) sends a
    matrix as the product of two of rank 2, and adds what that has lost to the next gradient.
    """
    if compress == "none":
        return None
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if compress == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return state
    hooks = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
    model.register_comm_hook(None, hooks[compress])
    return None
