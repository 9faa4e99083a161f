"""Running statistics in exact mode: BatchNorm's and InstanceNorm's, of each shard by itself, folded in the order of shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers of all BatchNorms and InstanceNorms, which training writes and does not read."""
    return [buffer for module in model.modules() if isinstance(module, _NormBase) for buffer in module.buffers(recurse=False)]


class BatchStatistics:
    """Sets the momentum of every BatchNorm and InstanceNorm to 1: after a forward, its buffers hold the statistics of that
    batch alone. A BatchNorm must have a momentum; `model_checks` refuses others.

    `tensors`: all the buffers that are taken care of here.
    """

    def __init__(self, model: nn.Module):
        kinds = (_BatchNorm, _InstanceNorm)
        norms = [m for m in model.modules() if isinstance(m, kinds) and m.running_mean is not None and m.momentum is not None]
        self.buffers: list[Tensor] = [norm.get_buffer(n) for norm in norms for n in ("running_mean", "running_var")]
        self.counted = [norm for norm in norms if isinstance(norm, _BatchNorm)]
        self.counts: list[Tensor] = [norm.get_buffer("num_batches_tracked") for norm in self.counted]
        self.tensors = [*self.buffers, *self.counts]
        momenta = [norm.momentum or 0.0 for norm in norms for _ in range(2)]
        weights = [torch.full_like(b, m) for b, m in zip(self.buffers, momenta, strict=True)]
        self.momentum = torch.cat(weights) if weights else torch.empty(0)  # of each number in the buffers
        self.length = len(self.momentum)
        for norm in norms:
            norm.momentum = 1.0

    def begin_step(self) -> None:
        """Remembers the running statistics before the forward passes of a step."""
        self.running, self.counts_before = self.of_last_forward(), [count.clone() for count in self.counts]
        self.before = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def begin_shard(self) -> None:
        """Puts the statistics of before the step back, which a layer may read, or leave as they are where it is passed by."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.before)

    def of_last_forward(self) -> Tensor:
        """[length], a copy, in the dtype of the buffers (the widest where they differ)."""
        return torch.cat(self.buffers) if self.buffers else self.momentum

    def fold(self, rows: list[Tensor]) -> None:
        """Folds the statistics of all shards of a step, in their order, into the running ones; what a shard has left as it was
        before the step is not folded."""
        if not self.buffers:
            return
        before = self.running.clone()
        for row in rows:
            row = row.to(self.running.dtype)
            self.running.lerp_(torch.where(row == before, self.running, row), self.momentum)
        for buffer, value in zip(self.buffers, self.running.split([len(b) for b in self.buffers]), strict=True):
            buffer.copy_(value)
        for norm, count, before in zip(self.counted, self.counts, self.counts_before, strict=True):
            count.copy_(before + len(rows) if norm.training else before)
