"""``sync.mode=local``: rounds of steps that each rank takes by itself, for slow links (DiLoCo)."""

from __future__ import annotations

from collections.abc import Sequence

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
from digitdist.sync.rounds import Exchange, Round, named_tensors
from digitdist.sync.strategy import Phase, StepStats, Strategy, check_finite, gather_state, own_state

SCALER_MEMORY = ("scale", "_growth_tracker")  # of a GradScaler's state, what changes from step to step


class Local(Strategy):
    """In a round, a rank uses the mean gradient of its own share of each global batch. Then all take one outer step from the
    global weights: SGD with Nesterov momentum, whose gradient is the mean over ranks of (global weights - a rank's weights)
    (Douillard et al., DiLoCo: Distributed Low-Communication Training of Language Models, 2023). Rate 1 without momentum is
    plain averaging. Buffers of floating-point numbers are averaged; others, and those with a value that is not finite from the
    start, such as a mask, are rank 0's.

    With `sync.overlap` a rank trains on while the differences are exchanged, and takes them in at the end of the next round:
    its weights are then the global ones plus what it has done meanwhile (Douillard et al., Streaming DiLoCo, 2025, with one
    fragment).

    Where weights are evaluated or saved, also within a round, ranks take in what they have done so far, and go back to what
    they had when they train on: neither has an influence on the training.
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
        self.own: Round | None = None  # where this rank goes on, while its weights are made equal to the others'

    @property
    def ranks_differ(self) -> bool:
        return self.exchange is not None or self.num_images > 0

    def compute_gradients(self, batch: Batch, count: int, step: int, stop: bool) -> None:
        """The gradient of the mean loss over this rank's share; zeros for an empty one. See `Strategy`. Not collective."""
        self._train_on()
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
        """Exchanges this round's differences, if the round ends here. Collective then, and with `make_equal`.

        The loss in its stats is the mean over all images of a round: this one so far or, with `sync.overlap`, the one before;
        None where there is none. A moving average is averaged like a buffer.

        Raises:
            Fault: with `look`, a loss is not finite; no rank has taken in the weights that it made.
        """
        stats = None
        if not step % self.every:
            self.phase("sync")
            stats = self._take_in(step, look)
            self._send(networks)
            if not self.overlap:
                stats = _both(stats, self._take_in(step, look))
        return _both(stats, self._lend(networks, step, look)) if make_equal else stats

    def synchronises(self, step: int, make_equal: bool) -> bool:
        return make_equal or not step % self.every

    def make_equal(self, networks: Sequence[nn.Module], step: int) -> None:
        """See `Strategy`. Buffers that are not averaged at the end of a round are rank 0's."""
        self._lend(networks, step, look=True)
        if self.world_size > 1:
            named = [item for network in networks for item in network.named_buffers()]
            broadcast_tensors([buffer for name, buffer in named if name in self.not_averaged])

    def _lend(self, networks: Sequence[nn.Module], step: int, look: bool) -> StepStats | None:
        """Ends the round here, until ranks train on; nothing where it is so already. Collective."""
        if self.own is not None:
            return None
        self.phase("sync")
        self.own = self._round(networks)
        stats = self._take_in(step, look)
        if self.num_images:
            self._send(networks)
            stats = _both(stats, self._take_in(step, look))
        return stats

    def _round(self, networks: Sequence[nn.Module]) -> Round:
        """Where this rank is in its round, as copies."""
        values = {name: tensor.detach().clone() for name, tensor in named_tensors(networks).items()}
        params = [parameter.clone() for parameter in self.global_params]
        momentum = {name: value.clone() for name, value in state_tensors(self.outer_optimizer).items()}
        return Round(networks, values, params, momentum, self.own_losses, self.num_images, self.exchange)

    @torch.no_grad()
    def _train_on(self) -> None:
        """Goes back to where this rank was before its weights were made equal to the others'."""
        own, self.own = self.own, None
        if own is None:
            return
        for name, tensor in named_tensors(own.networks).items():
            tensor.copy_(own.values[name])
        for parameter, value in zip(self.global_params, own.global_params, strict=True):
            parameter.copy_(value)
        load_state_tensors(self.outer_optimizer, own.momentum)
        self.own_losses, self.num_images, self.exchange = own.losses, own.num_images, own.exchange

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
        exchange.wait()
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

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        """The outer momentum, and the optimizer and fp16's loss scale of each rank, which differ. Collective."""
        groups = {"outer": state_tensors(self.outer_optimizer)} | gather_state("optimizer", state_tensors(optimizer))
        if self.accelerator.scaler:
            own = self.accelerator.scaler.state_dict()
            groups |= gather_state("scaler", {name: torch.tensor(own[name]) for name in SCALER_MEMORY})
        if self.own is not None:
            groups |= {"round": self.own.shared_tensors()} if self.own.is_open else {}
            own = gather_state("round", self.own.own_tensors())
            groups |= own if any(own.values()) else {}
        return groups

    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer, networks: Sequence[nn.Module]) -> None:
        """Restores what `state` returned. On another world size every rank resumes at the end of the round, with the main
        rank's optimizer and scale."""
        theirs = own_state("optimizer", stored, self.rank, self.world_size)
        if theirs is not None:
            load_state_tensors(optimizer, theirs)
        scaler, own_scale = self.accelerator.scaler, own_state("scaler", stored, self.rank, self.world_size)
        if scaler and own_scale is not None:
            scaler.load_state_dict(scaler.state_dict() | {name: value.item() for name, value in own_scale.items()})
        self.own = self._round(networks)
        self.own.global_params = [parameter.detach().clone() for parameter in self.parameters]
        self.own.momentum = stored.get("outer", {})
        own = own_state("round", stored, self.rank, self.world_size)
        if own is not None:
            self.own.restore(stored.get("round", {}), own, like=[*self.global_params, *self._averaged(networks)])
        self._train_on()


def _both(earlier: StepStats | None, later: StepStats | None) -> StepStats | None:
    """The later loss, and the requests to stop of both."""
    if earlier is None or later is None:
        return later or earlier
    return StepStats(later.loss, earlier.stop_requests + later.stop_requests)
