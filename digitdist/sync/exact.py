"""``sync.mode=exact``: gradients with the same bits for any world size up to the number of shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from digitdist.config import Config
from digitdist.data import Batch
from digitdist.distributed import prepare_module
from digitdist.errors import UserError
from digitdist.sync.batchnorm import BatchStatistics
from digitdist.sync.loss import TrainingLoss
from digitdist.sync.strategy import Phase, SynchronousStrategy
from digitdist.sync.tree import Tree, TreeReduction


class Exact(SynchronousStrategy):
    """A global batch is cut into ``sync.shards * train.accumulate`` fixed shards, the leaves of one fixed binary tree.

    A rank runs its shards one at a time and merges two nodes as soon as both are there, so that it keeps few gradients. Then
    the tree is finished over the nodes of all ranks, in the same order whoever has computed what.
    """

    def __init__(self, accelerator: Accelerator, loss: TrainingLoss, phase: Phase, config: Config):
        super().__init__(accelerator, loss, phase, config.sync.shards * config.train.accumulate)
        prepare_module(accelerator, loss, data_parallel=False)
        self.parameters = list(loss.model.parameters())
        others = {p.dtype for p in self.parameters} - {torch.float32}
        if others:
            raise UserError(f"sync.mode=exact sums float32 gradients, this model has {others.pop()}; use sync.mode=ddp")
        self.statistics = BatchStatistics(loss.model)
        length = sum(p.numel() for p in self.parameters) + 1  # and the loss
        self.reduction = TreeReduction(self.shardings, self.rank, length, self.statistics.length)

    def compute_gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Tensor:
        """See `Strategy`. Collective: every rank must call it, also with an empty share."""
        tree, rows = Tree(), []
        self.own_losses = []
        self.statistics.begin_step()
        for parameter in self.parameters:
            parameter.grad = None  # each shard's gradient begins there
        for shard in self.loss.micro_batches(batch, self.sharding, count):
            if not len(shard.labels):
                continue  # the last shards of a small batch are empty, on any world size
            self.phase("forward")
            with self.accelerator.autocast():
                total = self.loss.total(shard, step)
            self.phase("backward")
            self.accelerator.backward(total / count)
            self.own_losses.append(total.detach())
            tree.add(shard.number, 1, torch.cat([*map(_take_gradient, self.parameters), total.detach().view(1)]))
            rows.append(self.statistics.of_last_forward())
        self.phase("sync")
        stop_request = torch.full((1,), float(stop), device=self.accelerator.device)
        reduced = self.reduction.reduce(tree, rows, stop_request, min(count, self.sharding.num_micro_batches))
        self.statistics.fold(reduced.rows)
        self._set_gradients(reduced.root)
        return torch.stack([reduced.root[-1] / count, reduced.stop_requests])

    def _set_gradients(self, root: Tensor) -> None:
        """Makes each parameter's gradient a view of the root, which holds them one after another."""
        offset = root.storage_offset()
        for parameter in self.parameters:
            parameter.grad = root.as_strided(parameter.size(), parameter.stride(), offset)
            offset += parameter.numel()

    def broadcast_buffers(self, networks: Sequence[nn.Module]) -> None:
        """Nothing to do: every rank has folded the same statistics."""


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    """Takes the gradient away from `parameter`: its numbers in the order in which those of `parameter` lie in memory."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:  # it took no part in the loss
        return parameter.new_zeros(parameter.numel())
    alike = gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
    return alike.as_strided((alike.numel(),), (1,))
