"""BatchNorm's running statistics in exact mode: taken of each shard by itself, folded in the order of shards."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from digitdist.errors import UserError


class BatchStatistics:
    """Sets the momentum of every BatchNorm to 1: after a forward, its buffers hold the statistics of that batch alone.

    Raises:
        UserError: a BatchNorm has no momentum.
    """

    def __init__(self, model: nn.Module):
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        if any(norm.momentum is None for norm in norms):
            raise UserError("sync.mode=exact needs BatchNorm with a momentum; this model has momentum=None")
        self.buffers: list[Tensor] = [norm.get_buffer(n) for norm in norms for n in ("running_mean", "running_var")]
        self.counts: list[Tensor] = [norm.get_buffer("num_batches_tracked") for norm in norms]
        momenta = [norm.momentum or 0.0 for norm in norms for _ in range(2)]
        weights = [torch.full_like(b, m) for b, m in zip(self.buffers, momenta, strict=True)]
        self.momentum = torch.cat(weights) if weights else torch.empty(0)  # of each number in the buffers
        self.length = len(self.momentum)
        for norm in norms:
            norm.momentum = 1.0

    def begin_step(self) -> None:
        """Remembers the running statistics before the forward passes of a step."""
        self.running, self.counts_before = self.of_last_forward(), [count.clone() for count in self.counts]

    def of_last_forward(self) -> Tensor:
        """float32 [length], a copy."""
        return torch.cat(self.buffers) if self.buffers else self.momentum

    def fold(self, rows: list[Tensor]) -> None:
        """Folds the statistics of all shards of a step, in their order, into the running ones."""
        if not self.buffers:
            return
        for row in rows:
            self.running.lerp_(row, self.momentum)
        for buffer, value in zip(self.buffers, self.running.split([len(b) for b in self.buffers]), strict=True):
            buffer.copy_(value)
        for count, before in zip(self.counts, self.counts_before, strict=True):
            count.copy_(before + len(rows))
