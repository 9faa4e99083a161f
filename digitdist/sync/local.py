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
from digitdist.distributed import eager_optimizer, prepare_module
from digitdist.optim import load_state_tensors, state_tensors
from digitdist.sync.loss import TrainingLoss, stats_tensor
from digitdist.sync.strategy import Phase, StepStats, Strategy, check_finite, gather_state, own_state


@dataclass
class Exchange:
    """What a rank has sent at the end of a round, until the sum over all ranks is taken in."""

    message: Tensor  # of each weight: global - this rank's; then the other tensors, the loss and the request to stop
    targets: list[Tensor]  # this rank's weights, then the other tensors
    sent: list[Tensor]  # the values of the targets then
    losses: list[Tensor]
    num_images: int
    work: dist.Work | None


class Local(Strategy):
    """In a round, a rank uses the mean gradient of its own share of each global batch. Then all take one outer step from the
    global weights: SGD with Nesterov momentum, whose gradient is the mean over ranks of (global weights - a rank's weights)
    (Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models, 2023). Rate 1 without momentum is
    plain averaging. Buffers are averaged.

    With `sync.overlap` a rank trains on while the differences are exchanged, and takes them in at the end of the next round:
    its weights are then the global ones plus what it has done meanwhile (Douillard et al., Streaming DiLoCo, 2025, with one
    fragment).
    """

    def __init__(self, accelerator: Accelerator, loss: TrainingLoss, phase: Phase, config: Config):
        super().__init__(accelerator, loss, phase, config.train.accumulate * accelerator.num_processes)
        prepare_module(accelerator, loss, data_parallel=False)
        self.every, self.overlap = config.sync.every, config.sync.overlap
        self.parameters = list(loss.model.parameters())
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
        self.num_images, self.stop = self.num_images + count, stop

    def sync_round(self, networks: Sequence[nn.Module], step: int, make_equal: bool) -> StepStats | None:
        """Exchanges this round's differences, if the round ends here. Collective then: every rank must call it.

        The loss in its stats is the mean over all images of a round: this one or, with `sync.overlap`, the one before; None
        where there is none. With `make_equal` this round is taken in at once. A moving average is averaged like a buffer.

        Raises:
            Fault: a loss is not finite; no rank has taken in the weights that it made.
        """
        if step % self.every and not make_equal:
            return None
        self.phase("sync")
        earlier = self._take_in(step)
        self._send(networks)
        if self.overlap and not make_equal:
            return earlier
        stats = self._take_in(step)
        assert stats is not None
        return StepStats(stats.loss, stats.stop_requests + (earlier.stop_requests if earlier else 0.0))

    def drain(self, step: int) -> None:
        self._take_in(step)

    @torch.no_grad()
    def _send(self, networks: Sequence[nn.Module]) -> None:
        others = [t for t in networks[0].buffers() if t.is_floating_point()]
        others += [t for network in networks[1:] for t in network.state_dict().values() if t.is_floating_point()]
        differences = [ours - own for ours, own in zip(self.global_params, self.parameters, strict=True)]
        stats = stats_tensor(torch.stack(self.own_losses).sum(), float(self.stop))
        message = torch.cat([t.flatten() for t in (*differences, *others, stats)])
        work = dist.all_reduce(message, async_op=True) if self.world_size > 1 else None
        targets = [*self.parameters, *others]
        self.exchange = Exchange(message, targets, [t.clone() for t in targets], self.own_losses, self.num_images, work)
        self.own_losses, self.num_images = [], 0

    @torch.no_grad()
    def _take_in(self, step: int) -> StepStats | None:
        """Waits for the exchange that is in flight and takes the outer step; None if there is none."""
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return None
        if exchange.work:
            exchange.work.wait()
        total, stop_requests = exchange.message[-2:].tolist()
        stats = StepStats(total / exchange.num_images, stop_requests)
        check_finite(stats, exchange.losses, step)
        pieces = (exchange.message[:-2] / self.world_size).split([t.numel() for t in exchange.targets])
        means = [piece.view(t.shape) for piece, t in zip(pieces, exchange.targets, strict=True)]
        for parameter, difference in zip(self.global_params, means, strict=False):
            parameter.grad = difference
        self.outer_optimizer.step()
        agreed = [*self.global_params, *means[len(self.global_params) :]]
        for target, value, sent in zip(exchange.targets, agreed, exchange.sent, strict=True):
            target.copy_(value + (target - sent))
        return stats

    def broadcast_buffers(self, networks: Sequence[nn.Module]) -> None:
        """Nothing to do: they are averaged at the end of each round."""

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        """The outer momentum, and the optimizer of each rank, which differ. Collective."""
        return {"outer": state_tensors(self.outer_optimizer)} | gather_state("optimizer", state_tensors(optimizer))

    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer) -> None:
        """Restores what `state` returned; on another world size every rank resumes with the main rank's optimizer."""
        for ours, own in zip(self.global_params, self.parameters, strict=True):
            ours.copy_(own.detach())
        load_state_tensors(self.outer_optimizer, stored.get("outer", {}))
        theirs = own_state("optimizer", stored, self.rank, self.world_size)
        if theirs is not None:
            load_state_tensors(optimizer, theirs)
