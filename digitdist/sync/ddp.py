"""``sync.mode=ddp``: `DistributedDataParallel` as Accelerate prepares it; plain backward on one process."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from digitdist.checkpoint import Tensors
from digitdist.config import Config
from digitdist.data import Batch
from digitdist.distributed import broadcast_tensors, prepare_module
from digitdist.model_state import SavedBuffers
from digitdist.sync.batchnorm import running_statistics
from digitdist.sync.hooks import POWERSGD_MEMORY, register_hook
from digitdist.sync.loss import MicroBatch, TrainingLoss, stats_tensor
from digitdist.sync.strategy import Phase, SynchronousStrategy, gather_state, own_state


class TakePart(torch.autograd.Function):
    """Passes a loss on as it is, and has its graph reach all `parameters`, without a gradient for them.

    DistributedDataParallel waits for every parameter in every backward pass: also for one that takes no part in this step, or
    on this rank alone. This costs no message and changes no bit; `find_unused_parameters` costs an all-reduce a step.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients + (None,) * ctx.count


class Ddp(SynchronousStrategy):
    """Every rank runs `train.accumulate` micro-batches; DistributedDataParallel averages their gradients.

    Where the loss's own graph does not reach a parameter that gets a gradient (reentrant checkpointing runs backward passes
    inside the backward pass), the gradients are sent by one more backward pass, without images.
    """

    def __init__(self, accelerator: Accelerator, loss: TrainingLoss, phase: Phase, config: Config):
        super().__init__(accelerator, loss, phase, config.train.accumulate * accelerator.num_processes)
        # Compression would round a loss that travels with the gradients.
        loss.signal.requires_grad_(self.world_size > 1 and config.sync.compress == "none")
        # From when the last gradient is there, backward only waits for the other ranks. (On a GPU the host cannot see that.)
        self.gradients_ready: float | None = None
        if self.world_size > 1 and accelerator.device.type == "cpu":
            for parameter in (p for p in loss.parameters() if p.requires_grad):
                parameter.register_post_accumulate_grad_hook(self._note_ready)
        self.buffers = SavedBuffers(loss.model, without=running_statistics(loss.model))
        self.sends_afterwards = self.world_size > 1 and not loss.one_graph
        device, nothing = accelerator.device, torch.zeros(0, dtype=torch.int64, device=accelerator.device)
        self.empty = MicroBatch(0, torch.zeros(0, *loss.info.image_shape, device=device), nothing, nothing)
        self.module = prepare_module(accelerator, loss, data_parallel=True)
        self.powersgd = None
        if isinstance(self.module, DistributedDataParallel):
            self.powersgd = register_hook(self.module, config.sync.compress)
            self._settle_buckets(self.module)

    def compute_gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Tensor:
        """See `Strategy`. Collective: every rank must call it, also with an empty share.

        The loss is the sum over images divided by `count`, times the world size, since DistributedDataParallel averages over
        ranks: right for unequal shares.
        """
        self.loss.signal.grad, self.own_losses = None, []
        if self.world_size > 1:  # as DistributedDataParallel would, but for running statistics, which do not enter training
            broadcast_tensors(self.buffers.current())
        stats, reduction = None, None
        micro_batches = [*self.loss.micro_batches(batch, self.sharding, count), *[self.empty] * self.sends_afterwards]
        for left, micro_batch in zip(reversed(range(len(micro_batches))), micro_batches, strict=True):
            last = not left
            stop_requests = float(self.world_size * (stop and last))
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                self.phase("forward")
                with self.accelerator.autocast():
                    loss = self.module(micro_batch, step, count / self.world_size, stop_requests)
                self.own_losses.append(loss.detach())
                if last and not self.loss.signal.requires_grad:
                    stats = stats_tensor(functools.reduce(torch.add, self.own_losses), stop_requests)
                    reduction = dist.all_reduce(stats, async_op=True) if self.world_size > 1 else None
                self.phase("backward")
                self.accelerator.backward(self._with_all_parameters(loss) if last else loss)
        self.fill_gradients()
        self.phase("sync", self.gradients_ready)
        if reduction is not None:
            reduction.wait()
            stats /= self.world_size
        return self._carried_stats() if stats is None else stats

    def _with_all_parameters(self, loss: Tensor) -> Tensor:
        return TakePart.apply(loss, *self.parameters) if self.world_size > 1 else loss

    def _carried_stats(self) -> Tensor:
        """What `signal` has carried through the all-reduce, where the ranks' losses became their mean."""
        carried, scaler = self.loss.signal.grad, self.accelerator.scaler
        assert carried is not None
        return carried / scaler.scale(torch.ones_like(carried)) if scaler else carried

    def _note_ready(self, parameter: Tensor) -> None:
        self.gradients_ready = time.perf_counter()

    def _settle_buckets(self, module: DistributedDataParallel) -> None:
        """Runs two steps without images. Collective.

        DistributedDataParallel rebuilds its buckets once, after its first step, and sums in another order from then on: the
        first steps after a restart would have other bits than without the restart.
        """
        for _ in range(2):
            self._with_all_parameters(module(self.empty, 0, 1.0, 0.0)).backward()
            module.zero_grad()

    def make_equal(self, networks: Sequence[nn.Module], step: int) -> None:
        """Sends rank 0's buffers to all ranks. Collective."""
        if self.world_size > 1:
            broadcast_tensors([buffer for network in networks for buffer in network.buffers()])

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        """What PowerSGD remembers of the gradients it has rounded, which is each rank's own. Collective."""
        if self.powersgd is None:
            return {}
        own = {f"{name}.{n}": t for name in POWERSGD_MEMORY for n, t in getattr(self.powersgd, f"{name}_dict").items()}
        return gather_state("powersgd", own | {"iter": torch.tensor(self.powersgd.iter)})

    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer, networks: Sequence[nn.Module]) -> None:
        """Restores what `state` returned; on another world size PowerSGD starts without memory."""
        own = own_state("powersgd", stored, self.rank, self.world_size)
        if self.powersgd is None or own is None:
            return
        self.powersgd.iter = int(own.pop("iter"))
        for key, value in own.items():
            name, _, number = key.partition(".")
            getattr(self.powersgd, f"{name}_dict")[int(number)] = value.to(self.accelerator.device)
