"""What the `DataLoader`s here have in common, worker processes above all."""

from __future__ import annotations

import functools
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def loader_options(workers: int) -> dict[str, Any]:
    """The arguments of a `DataLoader` of whole batches with so many workers.

    It has a generator of its own, since it would otherwise draw on the global one.

    Workers are forked from a server that has no threads of its own: one that is forked from a rank, whose threads may hold
    locks at that moment, hangs now and then before it has read anything. Server and workers leave all requests to stop to this
    process. A whole job may be asked to stop, as by Slurm; the workers go on then, since their reader may want a last batch,
    and end when it says so or has ended.
    """
    options: dict[str, Any] = {"num_workers": workers, "collate_fn": _as_it_is, "generator": torch.Generator()}
    if not workers:
        return options
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__package__])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # new processes inherit it
    try:
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # again, since that has let some of them through
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return options | {"multiprocessing_context": context, "worker_init_fn": _listen_to_reader}


def _as_it_is(batch: Any) -> Any:
    return batch


def _listen_to_reader(worker: int) -> None:
    """Has a new worker end when the process that it reads for tells it to, or has ended itself."""
    reader: Any = multiprocessing.parent_process()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for wait in (reader.join, functools.partial(_wait_until_told, reader.pid)):
        threading.Thread(target=_end_after, args=[wait], daemon=True).start()


def _end_after(wait: Callable[[], None]) -> None:
    wait()
    os._exit(0)


def _wait_until_told(reader: int) -> None:
    if hasattr(signal, "sigwaitinfo"):
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != reader:
            pass
    else:  # macOS does not tell who sends a signal
        signal.sigwait([signal.SIGTERM])
