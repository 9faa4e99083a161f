"""What a training changes in its process, put back: for a notebook, or a program of the user's, that goes on after it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from digitdist.distributed.output import make_expendable
from digitdist.distributed.shortcuts import use_deterministic_algorithms
from digitdist.distributed.signals import SIGNALS


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Puts back the random generators of torch, for the CPU, numpy and Python, however the block ends."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):  # to look at those of others would start each GPU
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def process_restored(command: list[str]) -> Iterator[None]:
    """Puts back, however the block ends: environment, signal handlers, warning filters, random generators, torch's threads
    and switches, and Accelerate's state. Inside the block Accelerate and the switches are as in a new process, what is printed
    is expendable, and `sys.argv`, which a run records, is `command`.

    A process that goes on can then train with other settings.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(generators_kept())
        for name in ("argv", "stdout", "stderr"):
            stack.callback(setattr, sys, name, getattr(sys, name))
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(setattr, logging, "raiseExceptions", logging.raiseExceptions)
        if threading.current_thread() is threading.main_thread():  # which alone may set handlers
            for number in SIGNALS:
                stack.callback(signal.signal, number, signal.getsignal(number))
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(-1))
        _keep_torch(stack)
        for kind in (PartialState, AcceleratorState, GradientState):
            stack.callback(_refill, kind._shared_state, dict(kind._shared_state))
            kind._shared_state.clear()
        sys.argv = command
        make_expendable("stderr", "stdout")
        yield


def _keep_torch(stack: contextlib.ExitStack) -> None:
    """Has `stack` put back torch's settings, and makes the switches those of a new process."""
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    stack.callback(use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(), warn_only=warn_only)
    fills: Any = torch.utils.deterministic
    stack.callback(setattr, fills, "fill_uninitialized_memory", fills.fill_uninitialized_memory)
    torch.set_float32_matmul_precision("highest")
    use_deterministic_algorithms(False)


def _restore_environment(before: Mapping[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _refill(state: dict[str, Any], before: Mapping[str, Any]) -> None:
    state.clear()
    state.update(before)


def _stop_idle_threads() -> None:
    """Ends OpenMP's idle threads in the process that forks; they come back when they are needed.

    Without it a forked process, such as those of `accelerate.notebook_launcher`, would wait for them for ever.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None) if sys.platform == "linux" else None
    if pause:
        pause(2)  # omp_pause_hard


os.register_at_fork(before=_stop_idle_threads)
