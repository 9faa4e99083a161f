"""What raises where a host asks for a value: on a CPU, in place of a device that it would have to wait for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "_is_all_true")
METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__repr__")


class Transfer(Exception):
    pass


class _NoAsking(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ASKING:
            raise Transfer(f"{func} asks for what is on the device")
        return func(*args, **(kwargs or {}))


def _refuse(self: torch.Tensor, *_: Any, **__: Any) -> None:
    raise Transfer("a tensor is brought to the host")


@contextlib.contextmanager
def none_allowed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched, _NoAsking():
        for name in METHODS:
            patched.setattr(torch.Tensor, name, _refuse)
        yield
