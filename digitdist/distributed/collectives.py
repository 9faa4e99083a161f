"""What ranks do together, beyond the collectives of torch and Accelerate. Every rank must call these at the same place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from digitdist.checkpoint import Tensors, weights_sha256
from digitdist.distributed.heartbeat import Heartbeat
from digitdist.errors import Fault, Stopped, UserError

T = TypeVar("T")
STILL_AT_IT_S = 0.5  # between two signs of life; `sync.timeout_s` may be as short as tests have it


def run_on_main(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """Calls `act` on the main rank and returns its result on every rank. Collective: every rank must call it.

    A `UserError`, `Fault` or `Stopped` that it raises is raised on every rank.
    """
    outcome: list[Any] = [None, None]  # result, error
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except (UserError, Fault, Stopped) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def work_on_main(accelerator: Accelerator, act: Callable[[], T], heartbeat: Heartbeat | None = None) -> T:
    """As `run_on_main`, for an `act` that may take any time: the main rank says at intervals that it is at it, so that no other
    takes it for frozen. A rank that is frozen, or killed, while it acts ends the run as at any other time.

    `act` runs in a thread where there are other ranks. An error of another type than those of `run_on_main` is the main rank's
    own. `heartbeat`: None before there is one. Collective: every rank must call it.
    """
    if accelerator.num_processes == 1:
        return act()
    outcome: Future[T] = Future()
    if accelerator.is_main_process:
        threading.Thread(target=_fulfil, args=[outcome, act], name="main's work", daemon=True).start()
    is_done = [False]
    while not is_done[0]:
        if accelerator.is_main_process:
            is_done[0] = bool(wait([outcome], timeout=STILL_AT_IT_S).done)
        if heartbeat:
            heartbeat.turns += 1  # neither the rank that acts nor one that waits for it is frozen, as `PeerWatch` would think
        broadcast_object_list(is_done)
    return run_on_main(accelerator, outcome.result)


def _fulfil(outcome: Future[T], act: Callable[[], T]) -> None:
    try:
        outcome.set_result(act())
    except BaseException as error:
        outcome.set_exception(error)


def gather_rows(accelerator: Accelerator, rows: Tensor, padding: int) -> Tensor:
    """The rows of all ranks, rank 0's first, on the CPU. Collective: every rank must call it.

    A collective needs equal shapes, so `rows` [n, k] of a rank that has fewer are filled up with rows of `padding`.
    """
    return accelerator.gather(accelerator.pad_across_processes(rows, pad_index=padding)).cpu()


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Copies the main rank's values into `tensors`, of any dtype, in one broadcast. Collective: every rank must call it, with
    the same shapes and dtypes, where there are several."""
    if not tensors:
        return
    pieces = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
    message = torch.cat(pieces)
    dist.broadcast(message, src=0)
    for tensor, piece in zip(tensors, message.split([len(piece) for piece in pieces]), strict=True):
        tensor.copy_(piece.clone().view(tensor.dtype).view(tensor.shape))  # a clone, since a dtype needs aligned memory


def check_equal(tensors: Tensors, step: int) -> None:
    """Compares a hash of `tensors` over all ranks. Collective: every rank must call it.

    Raises:
        Fault: they differ; it names the rank and the first tensor that does.
    """
    if len(set(gather_object([weights_sha256(tensors)]))) == 1:
        return
    hashes = gather_object([{name: weights_sha256({name: tensor}) for name, tensor in tensors.items()}])
    for rank, theirs in enumerate(hashes):
        for name in tensors:
            if theirs[name] != hashes[0][name]:
                raise Fault(f"step {step}: rank {rank} and rank 0 differ in {name}; their weights must be equal")
