"""Shortcuts past what torch and the C library do by themselves: what each saves, and how to switch it off.

``DIGITDIST_WITHOUT=allocator,compiler`` runs without those named; ``python -m digitdist.bench --shortcuts`` shows what each
saves on a machine.

allocator   glibc keeps freed memory for the next step, instead of returning its pages and faulting them in anew.
compiler    torch does not import its compiler (2 s at the start) only to ask it to leave an optimizer alone, or to tell it
            that algorithms are deterministic.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import platform
import sys
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

SHORTCUTS = ("allocator", "compiler")


def shortcut_enabled(name: str) -> bool:
    """False where the environment variable DIGITDIST_WITHOUT names this shortcut."""
    assert name in SHORTCUTS
    return name not in os.environ.get("DIGITDIST_WITHOUT", "").split(",")


def keep_freed_memory() -> None:
    """Has glibc keep freed memory; other C libraries are left as they are."""
    if shortcut_enabled("allocator") and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def use_deterministic_algorithms(mode: bool, warn_only: bool = False) -> None:
    """torch's own function of that name, which tells torch's compiler of `mode` too, and imports it for that."""
    if shortcut_enabled("compiler") and "torch._inductor.config" not in sys.modules:
        torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)
    else:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


def eager_optimizer(kind: type[torch.optim.Optimizer], parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    """``kind(parameters, **options)``, an optimizer of torch's, whose methods do not import torch's compiler.

    torch wraps these methods so that its compiler leaves them alone, and imports the compiler for it.
    """
    if shortcut_enabled("compiler"):
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
            method = inspect.unwrap(getattr(torch.optim.Optimizer, name))
            # Where torch._compile keeps the method as its compiler returned it: the same, but for a mark.
            method.__dict__.setdefault("__dynamo_disable", method)
    optimizer = kind(parameters, **options)
    if shortcut_enabled("compiler"):
        optimizer.step = MethodType(torch.no_grad()(inspect.unwrap(kind.step)), optimizer)  # type: ignore[method-assign]
    return optimizer
