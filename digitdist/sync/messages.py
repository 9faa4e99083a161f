"""Tensors of several dtypes and shapes as few flat messages, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(tensors: Sequence[Tensor]) -> dict[torch.dtype, Tensor]:
    """One flat vector for each dtype, with the values of its tensors one after another."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor.flatten())
    return {dtype: torch.cat(group) for dtype, group in groups.items()}


def unpack(messages: dict[torch.dtype, Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that `pack` was given, which have the shapes and dtypes of `like`, as views of `messages`."""
    used = dict.fromkeys(messages, 0)
    tensors = []
    for tensor in like:
        start = used[tensor.dtype]
        used[tensor.dtype] += tensor.numel()
        tensors.append(messages[tensor.dtype][start : used[tensor.dtype]].view(tensor.shape))
    return tensors
