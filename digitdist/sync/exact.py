"""``sync.mode=exact``: gradients with the same bits for any world size up to the number of shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from digitdist.config import Config
from digitdist.data import Batch
from digitdist.distributed import broadcast_tensors, prepare_module
from digitdist.model_state import SavedBuffers
from digitdist.sync.batchnorm import BatchStatistics
from digitdist.sync.loss import TrainingLoss
from digitdist.sync.strategy import Phase, SynchronousStrategy
from digitdist.sync.tree import Tree, TreeReduction


class Exact(SynchronousStrategy):
    """A global batch is cut into ``sync.shards * train.accumulate`` fixed shards, the leaves of one fixed binary tree.

    A rank runs its shards one at a time and merges two nodes as soon as both are there, so that it keeps few gradients. Then
    the tree is finished over the nodes of all ranks, in the same order whoever has computed what.

    Buffers other than running statistics, which a forward pass may change too (spectral norm's vectors, a counter): every shard
    begins with those of the step before, and what shard 0 makes of them is kept.
    """

    def __init__(self, accelerator: Accelerator, loss: TrainingLoss, phase: Phase, config: Config):
        super().__init__(accelerator, loss, phase, config.sync.shards * config.train.accumulate)
        prepare_module(accelerator, loss, data_parallel=False)
        self.statistics = BatchStatistics(loss.model)
        self.buffers = SavedBuffers(loss.model, without=self.statistics.tensors)
        # Gradients and statistics are sent together, in a dtype that holds each of them whole.
        kinds = {torch.float32, self.statistics.momentum.dtype, *(p.dtype for p in self.parameters)}
        self.dtype = torch.float64 if torch.float64 in kinds else torch.float32
        length = sum(p.numel() for p in self.parameters) + 1  # and the loss
        self.strides = [torch.empty_like(p).stride() for p in self.parameters]  # dense, also where a parameter is a view
        self.reduction = TreeReduction(self.shardings, self.rank, length, self.statistics.length)

    def compute_gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Tensor:
        """See `Strategy`. Collective: every rank must call it, also with an empty share."""
        tree, rows = Tree(), []
        self.own_losses = []
        self.statistics.begin_step()
        self.buffers.save()
        kept = self.buffers.values
        for parameter in self.parameters:
            parameter.grad = None  # each shard's gradient begins there
        for shard in self.loss.micro_batches(batch, self.sharding, count):
            if not len(shard.labels):
                continue  # the last shards of a small batch are empty, on any world size
            self.statistics.begin_shard()
            self.phase("forward")
            with self.accelerator.autocast():
                total = self.loss.total(shard, step)
            self.phase("backward")
            self.accelerator.backward(total / count)
            self.own_losses.append(total.detach())
            tree.add(shard.number, 1, self._take_gradients(total))
            rows.append(self.statistics.of_last_forward())
            if not shard.number:
                kept = [buffer.detach().clone() for buffer in self.buffers.current()]
            self.buffers.restore()
        self.phase("sync")
        stop_request = torch.full((1,), float(stop), dtype=self.dtype, device=self.accelerator.device)
        reduced = self.reduction.reduce(tree, rows, stop_request, min(count, self.sharding.num_micro_batches))
        self.statistics.fold(reduced.rows)
        self._agree_on_buffers(kept)
        self._set_gradients(reduced.root)
        return torch.stack([reduced.root[-1] / count, reduced.stop_requests]).float()

    def _take_gradients(self, total: Tensor) -> Tensor:
        """A shard's gradients, taken away from the parameters, and its loss, one after another."""
        return torch.cat([*map(_take_gradient, self.parameters, self.strides), total.detach().view(1)]).to(self.dtype)

    def _agree_on_buffers(self, kept: list[Tensor]) -> None:
        """Gives every rank `kept` as rank 0, which has shard 0, has it. Collective."""
        if self.world_size > 1:
            broadcast_tensors(kept)
        self.buffers.restore(kept)

    def _set_gradients(self, root: Tensor) -> None:
        """Makes each parameter's gradient a view of the root, which holds them one after another, or a copy in its dtype.

        The root begins where its memory does, whoever has computed what, so a gradient's alignment, by which a GPU chooses how
        to sum its norm, does not depend on the world size.
        """
        offset = root.storage_offset()
        for parameter, stride in zip(self.parameters, self.strides, strict=True):
            gradient = root.as_strided(parameter.size(), stride, offset)
            parameter.grad = gradient.to(parameter.dtype)
            offset += parameter.numel()

    def make_equal(self, networks: Sequence[nn.Module], step: int) -> None:
        """Nothing to do: every rank has folded the same statistics."""


def _take_gradient(parameter: nn.Parameter, stride: tuple[int, ...]) -> Tensor:
    """Takes the gradient away from `parameter`: its numbers in the order of a dense tensor of these strides."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:  # it took no part in the loss
        return parameter.new_zeros(parameter.numel())
    alike = gradient if gradient.stride() == stride else torch.empty_like(parameter).copy_(gradient)
    return alike.as_strided((alike.numel(),), (1,))
