"""``sync.mode=local``: rounds of steps that each rank takes by itself, for slow links (DiLoCo)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from digitdist.checkpoint import Tensors
from digitdist.config import Config
from digitdist.data import Batch
from digitdist.distributed import broadcast_tensors, eager_optimizer, prepare_module
from digitdist.model_state import transient_buffers
from digitdist.optim import load_state_tensors, state_tensors
from digitdist.sync.loss import TrainingLoss, stats_tensor
from digitdist.sync.messages import pack, unpack
from digitdist.sync.strategy import Phase, StepStats, Strategy, check_finite, gather_state, own_state

SCALER_MEMORY = ("scale", "_growth_tracker")  # of a GradScaler's state, what changes from step to step


@dataclass
class Exchange:
    """What a rank has sent at the end of a round, until the sum over all ranks is taken in."""

    parts: list[Tensor]  # of each weight: global - this rank's; then the other tensors, the loss and the request to stop
    messages: dict[torch.dtype, Tensor]  # what has been sent of them
    networks: Sequence[nn.Module]
    sent: list[Tensor]  # this rank's weights, then the other tensors, as they were then
    losses: list[Tensor]
    num_images: int
    work: list[dist.Work]


class Local(Strategy):
    """In a round, a rank uses the mean gradient of its own share of each global batch. Then all take one outer step from the
    global weights: SGD with Nesterov momentum, whose gradient is the mean over ranks of (global weights - a rank's weights)
    (Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models, 2023). Rate 1 without momentum is
    plain averaging. Buffers of floating-point numbers are averaged; others, and those with a value that is not finite from the
    start, such as a mask, are rank 0's.

    With `sync.overlap` a rank trains on while the differences are exchanged, and takes them in at the end of the next round:
    its weights are then the global ones plus what it has done meanwhile (Douillard et al., Streaming DiLoCo, 2025, with one
    fragment).
    """

    def __init__(self, accelerator: Accelerator, loss: TrainingLoss, phase: Phase, config: Config):
        super().__init__(accelerator, loss, phase, config.train.accumulate * accelerator.num_processes)
        prepare_module(accelerator, loss, data_parallel=False)
        self.every, self.overlap = config.sync.every, config.sync.overlap
        self.not_averaged = {
            name
            for name, buffer in loss.model.named_buffers()
            if not (buffer.is_floating_point() and bool(buffer.isfinite().all()))
        }
        self.global_params = [p.detach().clone() for p in self.parameters]
        momentum = config.sync.outer_momentum
        self.outer_optimizer = eager_optimizer(
            torch.optim.SGD, self.global_params, lr=config.sync.outer_lr, momentum=momentum, nesterov=momentum > 0
        )
        self.num_images, self.stop = 0, False  # of all ranks in this round; whether this rank was asked to stop
        self.exchange: Exchange | None = None

    @property
    def in_flight(self) -> bool:
        return self.exchange is not None

    def compute_gradients(self, batch: Batch, count: int, step: int, stop: bool) -> None:
        """The gradient of the mean loss over this rank's share; zeros for an empty one. See `Strategy`. Not collective."""
        for micro_batch in self.loss.micro_batches(batch, self.sharding, count):
            self.phase("forward")
            with self.accelerator.autocast():
                total = self.loss.total(micro_batch, step)
            self.phase("backward")
            self.accelerator.backward(total / max(1, len(batch.labels)))
            self.own_losses.append(total.detach())
        self.fill_gradients()
        self.num_images, self.stop = self.num_images + count, stop

    def sync_round(self, networks: Sequence[nn.Module], step: int, make_equal: bool, look: bool) -> StepStats | None:
        """Exchanges this round's differences, if the round ends here. Collective then: every rank must call it.

        The loss in its stats is the mean over all images of a round: this one or, with `sync.overlap`, the one before; None
        where there is none. With `make_equal` this round is taken in at once. A moving average is averaged like a buffer.

        Raises:
            Fault: with `look`, a loss is not finite; no rank has taken in the weights that it made.
        """
        if not self.synchronises(step, make_equal):
            return None
        self.phase("sync")
        earlier = self._take_in(step, look)
        self._send(networks)
        if self.overlap and not make_equal:
            return earlier
        stats = self._take_in(step, look)
        if stats is None or earlier is None:
            return stats
        return StepStats(stats.loss, stats.stop_requests + earlier.stop_requests)

    def synchronises(self, step: int, make_equal: bool) -> bool:
        return make_equal or not step % self.every

    def drain(self, step: int) -> None:
        self._take_in(step, look=True)

    @torch.no_grad()
    def _send(self, networks: Sequence[nn.Module]) -> None:
        differences = [ours - own for ours, own in zip(self.global_params, self.parameters, strict=True)]
        others = self._averaged(networks)
        parts = [*differences, *others, stats_tensor(torch.stack(self.own_losses).sum(), float(self.stop))]
        messages, work = pack(parts), []
        if self.world_size > 1:
            work = [dist.all_reduce(message, async_op=True) for message in messages.values()]
        sent = [t.clone() for t in (*self.parameters, *others)]
        self.exchange = Exchange(parts, messages, networks, sent, self.own_losses, self.num_images, work)
        self.own_losses, self.num_images = [], 0

    @torch.no_grad()
    def _take_in(self, step: int, look: bool) -> StepStats | None:
        """Waits for the exchange that is in flight and takes the outer step; None if there is none, or without `look`."""
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return None
        for work in exchange.work:
            work.wait()
        *sums, told = unpack(exchange.messages, exchange.parts)
        stats = self._read(told, exchange, step) if look else None
        means = [part / self.world_size for part in sums]
        for parameter, difference in zip(self.global_params, means, strict=False):
            parameter.grad = difference
        self.outer_optimizer.step()
        agreed = [*self.global_params, *means[len(self.global_params) :]]
        targets = [*self.parameters, *self._averaged(exchange.networks)]  # as they are now: a forward pass may replace buffers
        for target, value, sent in zip(targets, agreed, exchange.sent, strict=True):
            target.copy_(value + (target - sent))
        return stats

    def _read(self, told: Tensor, exchange: Exchange, step: int) -> StepStats:
        total, stop_requests = told.tolist()
        stats = StepStats(total / exchange.num_images, stop_requests)
        check_finite(stats, exchange.losses, step)
        return stats

    def _averaged(self, networks: Sequence[nn.Module]) -> list[Tensor]:
        """What is averaged as it is: buffers of the model, and all of its moving average. A tied tensor is there once."""
        model, *averages = networks
        named = list(model.named_buffers())
        for average in averages:
            named += [*average.state_dict(keep_vars=True).items(), *transient_buffers(average).items()]
        kept = (t for name, t in named if name not in self.not_averaged and isinstance(t, Tensor) and t.is_floating_point())
        return list({id(tensor): tensor for tensor in kept}.values())

    def broadcast_buffers(self, networks: Sequence[nn.Module]) -> None:
        """Sends rank 0's buffers to all ranks, but for those that are averaged at the end of each round. Collective."""
        if self.world_size > 1:
            named = [item for network in networks for item in network.named_buffers()]
            broadcast_tensors([buffer for name, buffer in named if name in self.not_averaged])

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        """The outer momentum, and the optimizer and fp16's loss scale of each rank, which differ. Collective."""
        groups = {"outer": state_tensors(self.outer_optimizer)} | gather_state("optimizer", state_tensors(optimizer))
        if self.accelerator.scaler:
            own = self.accelerator.scaler.state_dict()
            groups |= gather_state("scaler", {name: torch.tensor(own[name]) for name in SCALER_MEMORY})
        return groups

    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer) -> None:
        """Restores what `state` returned; on another world size every rank resumes with the main rank's optimizer and scale."""
        for ours, own in zip(self.global_params, self.parameters, strict=True):
            ours.copy_(own.detach())
        load_state_tensors(self.outer_optimizer, stored.get("outer", {}))
        theirs = own_state("optimizer", stored, self.rank, self.world_size)
        if theirs is not None:
            load_state_tensors(optimizer, theirs)
        scaler, own_scale = self.accelerator.scaler, own_state("scaler", stored, self.rank, self.world_size)
        if scaler and own_scale is not None:
            scaler.load_state_dict(scaler.state_dict() | {name: value.item() for name, value in own_scale.items()})
