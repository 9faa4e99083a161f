"""The ways in which ranks agree on the gradient of a global batch.

* `Ddp`: DistributedDataParallel, as Accelerate prepares it.
* `Exact`: fixed shards, their gradients summed in one fixed binary tree: the same bits for any world size.
* `Local`: each rank goes by its own gradients, and all meet every so many steps.

The first two leave in ``.grad`` of every parameter, on every rank, the gradient of the mean loss over the whole global
batch. Where ranks meet, they also learn the loss, and whether one was asked to stop: these travel with the rest, so that a
step has no collective of its own for them.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from digitdist import optim
from digitdist.checkpoint import Tensors, weights_sha256
from digitdist.config import Config, SyncConfig, UserError
from digitdist.data import SPECS, Batch, ImageSet, Sharding, augment, key_of, normalise
from digitdist.runtime import Fault

if TYPE_CHECKING:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

POWER_MEMORY = ("error", "p_memory", "q_memory")  # what a PowerSGDState keeps, as NAME_dict: number of a bucket to tensor
Enter = Callable[..., None]  # told each phase of a step as it begins, with the time where that was earlier
# What every rank knows after a meeting, float32 [2], on the device until somebody asks: the mean loss of the images since
# the last meeting, and how many ranks were asked to stop.
Told = Tensor
Node = tuple[int, int]  # of a tree: its first leaf, and how many it has


@dataclass(frozen=True)
class Agreed:
    """What the host has read of a `Told`."""

    loss: float
    stops: float

    @classmethod
    def read(cls, told: Told) -> Agreed:
        """Waits for the device that `told` is on."""
        return cls(*told.tolist())


class GradientSync(Protocol):
    sharding: Sharding
    objective: Objective
    own_losses: list[Tensor]  # of this rank's parts since the last meeting

    @property
    def under_way(self) -> bool:
        """Whether ranks exchange in the background, so that their weights differ."""

    def gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Told | None:
        """What was agreed on; None where the ranks go on by themselves, until `end_round`. No host waits for its device."""

    def end_round(self, networks: Sequence[nn.Module], step: int, together: bool) -> Agreed | None: ...

    def settle(self, step: int) -> None: ...

    def agree_on_buffers(self, networks: Sequence[nn.Module]) -> None: ...

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        """What a checkpoint needs beside weights and the main rank's optimizer: groups of tensors. Collective."""

    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer) -> None: ...


class Objective(nn.Module):
    """The training loss of one part of a global batch: seeds the generators, normalises, augments, runs the model.

    `signal` is a parameter that is always 0 and that no optimizer knows. Its gradient is whatever the loss multiplies it
    with, and so carries numbers through the gradients' all-reduce.
    """

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model, self.spec, self.augment = model, SPECS[config.data.name], config.augment
        self.label_smoothing, self.seed = config.train.label_smoothing, config.seed
        self.signal = nn.Parameter(torch.zeros(2))
        self.remembers = config.data.focus > 1
        self.of_images: list[Tensor] = []  # where they are remembered: each image's loss, of the parts of this step

    def total(self, pixels: Tensor, labels: Tensor, step: int, part: int) -> Tensor:
        """The summed loss, a float32 scalar, of `pixels` as `normalise` gives them, with labels int64 [n].

        Dropout and augmentation draw from generators keyed by (seed, step, part), whichever rank runs the part.
        """
        if not len(pixels):
            return sum((p.sum() * 0 for p in self.model.parameters()), torch.zeros((), device=pixels.device))
        seed_generators(key_of(self.seed, step, part), pixels.device)
        logits = self.model(augment(pixels, self.augment, -self.spec.mean / self.spec.std)).float()
        if self.remembers:
            self.of_images.append(F.cross_entropy(logits.detach(), labels, reduction="none"))
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)

    def forward(self, images: Tensor, labels: Tensor, step: int, part: int, count: float, stop: float) -> Tensor:
        """The summed loss divided by `count`; that and `stop` are put into the gradient of `signal`, where it takes one."""
        mean = self.total(normalise(images, self.spec), labels, step, part) / count
        return mean + self.signal @ _told(mean, stop) if self.signal.requires_grad else mean


def _told(loss: Tensor, stop: float) -> Told:
    return torch.stack([loss.detach(), torch.full_like(loss, stop)])


def autocast(accelerator: Accelerator) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context of a forward pass; in fp32, one without Accelerate's 20 µs for nothing."""
    return nullcontext if accelerator.mixed_precision == "no" else accelerator.autocast


def backward(accelerator: Accelerator, loss: Tensor) -> None:
    """`Accelerator.backward` without its division by a number of accumulation steps that is always 1 here."""
    (accelerator.scaler.scale(loss) if accelerator.scaler else loss).backward()


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds torch's generators of the CPU and of `device`: `torch.manual_seed` without its 0.2 ms for devices not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class EveryStep:
    """What the ways have in common in which ranks meet in every step."""

    under_way = False

    def end_round(self, networks: Sequence[nn.Module], step: int, together: bool) -> Agreed:
        raise AssertionError("there are no rounds")

    def settle(self, step: int) -> None:
        """Nothing to do: every step waits for all ranks."""

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        return {}

    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer) -> None:
        """Nothing to do: all that is remembered is in the model and the optimizer."""


class Ddp(EveryStep):
    """DistributedDataParallel, and plain backward on one process."""

    def __init__(self, accelerator: Accelerator, objective: Objective, accumulate: int, compress: str, enter: Enter):
        self.accelerator, self.objective, self.enter = accelerator, objective, enter
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.autocast = autocast(accelerator)
        self.sharding = Sharding.of(accumulate * self.world_size, self.rank, self.world_size)
        self.own_losses: list[Tensor] = []
        self.signal = objective.signal
        # A compressed loss would be a rounded one.
        self.signal.requires_grad_(self.world_size > 1 and compress == "none")
        # From when the last gradient is there, backward only waits for the other ranks. (On a GPU the host cannot see that.)
        self.ready: float | None = None
        if self.world_size > 1 and accelerator.device.type == "cpu":
            for parameter in (p for p in objective.parameters() if p.requires_grad):
                parameter.register_post_accumulate_grad_hook(self._note_ready)
        # On one process it would only import much.
        self.wrapped = accelerator.prepare_model(objective) if self.world_size > 1 else objective
        self.power: PowerSGDState | None = None
        if isinstance(self.wrapped, DistributedDataParallel):
            self.power = _register_hook(self.wrapped, compress, accelerator.device)
        self._settle_buckets(accelerator.device)

    def gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Told:
        """Collective: every rank must call it, also with an empty share.

        `batch` is this rank's share of a global batch of `count` images. The loss is the sum over images divided by
        `count`, times the world size, since DistributedDataParallel averages over ranks; parts may thus be unequal.
        """
        images, labels, _ = batch
        self.signal.grad, self.own_losses = None, []
        told, meeting, world_size = None, None, self.world_size
        parts = list(self.sharding.slices(count))
        for part, place in parts:
            last = part == parts[-1][0]
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                self.enter("forward")
                with self.autocast():
                    stops = float(world_size * (stop and last))
                    loss = self.wrapped(images[place], labels[place], step, part, count / world_size, stops)
                self.own_losses.append(loss.detach())
                if last and not self.signal.requires_grad:
                    told = _told(functools.reduce(torch.add, self.own_losses), stops)
                    meeting = dist.all_reduce(told, async_op=True) if world_size > 1 else None
                self.enter("backward")
                backward(self.accelerator, loss)
        self.enter("sync", self.ready)
        if meeting is not None:
            meeting.wait()
            told /= world_size
        return told if told is not None else self._carried()

    def _carried(self) -> Told:
        """What `signal` has carried through the all-reduce, where the ranks' losses became their mean."""
        carried, scaler = self.signal.grad, self.accelerator.scaler
        assert carried is not None
        return carried / scaler.scale(torch.ones_like(carried)) if scaler else carried

    def _note_ready(self, parameter: Tensor) -> None:
        self.ready = time.perf_counter()

    def _settle_buckets(self, device: torch.device) -> None:
        """Runs two steps without images. Collective.

        DistributedDataParallel rebuilds its buckets once, after its first step (with a static graph, its second), and sums in
        another order from then on: the first steps after a restart would have other bits than they had without.
        """
        if self.world_size > 1:
            images, labels = torch.zeros(0, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
            for _ in range(2):
                self.wrapped(images.to(device), labels.to(device), 0, 0, 1.0, 0.0).backward()
                self.wrapped.zero_grad()

    def agree_on_buffers(self, networks: Sequence[nn.Module]) -> None:
        """Sends rank 0's buffers to all, as DistributedDataParallel would before each forward. Collective.

        BatchNorm's running statistics do not enter training, so that it is enough to do it before they are used.
        """
        if self.world_size > 1:
            for buffer in (buffer for network in networks for buffer in network.buffers()):
                dist.broadcast(buffer, src=0)

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        """What PowerSGD remembers of the gradients that it has rounded, which is each rank's own. Collective."""
        if self.power is None:
            return {}
        own = {f"{name}.{n}": t for name in POWER_MEMORY for n, t in getattr(self.power, f"{name}_dict").items()}
        return _of_all_ranks("powersgd", own | {"iter": torch.tensor(self.power.iter)})

    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer) -> None:
        """Takes back what `state` gave; on another world size PowerSGD starts without memories."""
        own = _of_this_rank("powersgd", stored, self.rank, self.world_size)
        if self.power is None or own is None:
            return
        self.power.iter = int(own.pop("iter"))
        for key, value in own.items():
            name, _, number = key.partition(".")
            getattr(self.power, f"{name}_dict")[int(number)] = value


class Exact(EveryStep):
    """Gradients with the same bits for any world size up to the number of shards.

    A global batch is cut into `shards * accumulate` fixed parts, the leaves of one fixed binary tree. A rank runs a
    stretch of leaves one at a time and merges two nodes as soon as both are there, so that it keeps few gradients; then
    the ranks' nodes meet, and the tree is finished in the same order whoever computed what.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, leaves: int, enter: Enter):
        self.accelerator, self.objective, self.enter = accelerator, objective, enter
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.autocast = autocast(accelerator)
        self.sharding = Sharding.of(leaves, self.rank, self.world_size)
        self.own_losses: list[Tensor] = []
        self.parameters = list(objective.model.parameters())
        others = {p.dtype for p in self.parameters} - {torch.float32}
        if others:
            raise UserError(f"sync.mode=exact sums float32 gradients, this model has {others.pop()}; use sync.mode=ddp")
        self.statistics = BatchStatistics(objective.model)

    def gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Told:
        """Collective: every rank must call it, also with an empty share. `batch` is its share of `count` images."""
        pixels, labels = normalise(batch[0], self.objective.spec), batch[1]
        tree, rows, scaler = Tree(), [], self.accelerator.scaler
        self.own_losses = []
        self.statistics.begin()
        for leaf, place in self.sharding.slices(count):
            if place.start == place.stop:
                continue  # the last leaves of a small batch are empty, for every world size
            self.enter("forward")
            with self.autocast():
                total = self.objective.total(pixels[place], labels[place], step, leaf)
            self.enter("backward")
            loss = scaler.scale(total / count) if scaler else total / count
            pieces = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            self.own_losses.append(total.detach())
            flat = [_flat(piece, parameter) for piece, parameter in zip(pieces, self.parameters, strict=True)]
            tree.add(leaf, 1, torch.cat([*flat, total.detach().view(1)]))
            rows.append(self.statistics.of_last_forward())
        self.enter("sync")
        vector, all_rows, stops = self._meet(tree, rows, float(stop), min(count, self.sharding.parts))
        self.statistics.fold(all_rows)
        at = 0
        for parameter in self.parameters:
            parameter.grad = vector.as_strided(parameter.size(), parameter.stride(), vector.storage_offset() + at)
            at += parameter.numel()
        return torch.stack([vector[-1] / count, stops])

    def agree_on_buffers(self, networks: Sequence[nn.Module]) -> None:
        """Nothing to do: every rank has folded the same statistics."""

    def _meet(self, tree: Tree, rows: list[Tensor], stop: float, leaves: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """The root of the tree, the statistics of all `leaves` in their order, the sum of all `stop`. Collective.

        Two ranks send each other their nodes. More of them do as in a ring all-reduce: each first gets one slice of every
        node and finishes the tree on it, and then all gather the slices. A rank thus sends 2·(W-1)/W of a gradient where W is
        a power of two that divides the leaves, and every rank holds one node; up to the number of its nodes times that
        elsewhere.
        """
        own_stop = torch.full((1,), stop, device=self.parameters[0].device)
        if self.world_size == 1:
            return tree.root(), rows, own_stop[0]
        nodes = [self._nodes_of(rank, leaves) for rank in range(self.world_size)]
        length = sum(p.numel() for p in self.parameters) + 1
        direct = self.world_size == 2
        head = self._own_nodes(tree, max(map(len, nodes)), length) if direct else self._own_slice(tree, nodes, length)

        counts = [len(self._leaves_of(rank, leaves)) for rank in range(self.world_size)]
        statistics = head.new_zeros(max(counts), self.statistics.length)
        if rows:
            statistics[: len(rows)] = torch.stack(rows)
        message = torch.cat([head, statistics.flatten(), own_stop])
        gathered = [torch.empty_like(message) for _ in range(self.world_size)]
        dist.all_gather(gathered, message)

        heads = [g[: len(head)] for g in gathered]
        root = _finish(nodes, [h.view(-1, length) for h in heads]) if direct else torch.cat(heads)[:length]
        all_rows = [row for g, n in zip(gathered, counts, strict=True) for row in g[len(head) : -1].view(statistics.shape)[:n]]
        return root, all_rows, torch.stack([g[-1] for g in gathered]).sum()

    def _own_nodes(self, tree: Tree, most: int, length: int) -> Tensor:
        """This rank's nodes one after another, in a vector with room for `most` of them."""
        room = self.parameters[0].new_zeros((most - len(tree.nodes)) * length)
        return torch.cat([*(value for _, _, value in tree.nodes), room])

    def _own_slice(self, tree: Tree, nodes: list[list[Node]], length: int) -> Tensor:
        """The slice of the root that this rank finishes, from that slice of the nodes of all ranks. Collective."""
        width = -(-length // self.world_size)
        own = self.parameters[0].new_zeros(len(tree.nodes), self.world_size * width)
        for row, (_, _, value) in zip(own, tree.nodes, strict=True):
            row[:length] = value
        sizes = [len(n) * width for n in nodes]
        received = own.new_empty(sum(sizes))
        by_rank = own.view(-1, self.world_size, width).transpose(0, 1).contiguous().flatten()
        dist.all_to_all_single(received, by_rank, sizes, [sizes[self.rank]] * self.world_size)
        return _finish(nodes, [part.view(-1, width) for part in received.split(sizes)])

    def _leaves_of(self, rank: int, leaves: int) -> range:
        """The leaves of `rank` that hold an image, where the first `leaves` do."""
        mine = Sharding.of(self.sharding.parts, rank, self.world_size).mine
        return range(min(mine.start, leaves), min(mine.stop, leaves))

    def _nodes_of(self, rank: int, leaves: int) -> list[Node]:
        tree = Tree()
        for leaf in self._leaves_of(rank, leaves):
            tree.add(leaf, 1, torch.empty(0))
        return [(start, size) for start, size, _ in tree.nodes]


def _flat(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The numbers of `gradient` in the order in which those of `parameter` lie in memory."""
    alike = gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
    return alike.as_strided((alike.numel(),), (1,))


def _finish(nodes: list[list[Node]], values: list[Tensor]) -> Tensor:
    """The root over the nodes of all ranks, whose `values` are the first rows of a matrix for each rank."""
    tree = Tree()
    for theirs, rows in zip(nodes, values, strict=True):
        for (start, size), row in zip(theirs, rows, strict=False):
            tree.add(start, size, row)
    return tree.root()


@dataclass
class Exchange:
    """What a rank has sent at the end of a round, until the sum over all ranks is taken in."""

    message: Tensor  # per weight the common one - this rank's, then the other tensors, the loss and the request to stop
    targets: list[Tensor]  # this rank's weights, then the other tensors
    sent: list[Tensor]  # what the targets were
    losses: list[Tensor]
    images: int
    work: dist.Work | None


class Local:
    """Rounds of steps that each rank takes by itself; where a round ends, the ranks meet (DiLoCo: Douillard et al., 2023).

    In a round, a rank goes by the mean gradient of its own share of each global batch. Then all take one outer step from the
    common weights: SGD with Nesterov momentum, whose gradient is the mean over ranks of (common weights - a rank's weights).
    Rate 1 without momentum is plain averaging. Buffers are averaged.

    With `sync.overlap` (Streaming DiLoCo: Douillard et al., 2025, of which this is the case of one fragment) a rank goes on
    while the differences are on their way, and takes them in at the end of the next round: its weights are then the common
    ones plus what it has done meanwhile.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, accumulate: int, config: SyncConfig, enter: Enter):
        self.accelerator, self.objective, self.enter = accelerator, objective, enter
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.autocast = autocast(accelerator)
        self.sharding = Sharding.of(accumulate * self.world_size, self.rank, self.world_size)
        self.own_losses: list[Tensor] = []
        self.parameters = list(objective.model.parameters())
        self.common = [p.detach().clone() for p in self.parameters]
        momentum = config.outer_momentum
        self.outer = optim.unwrapped(torch.optim.SGD)(self.common, config.outer_lr, momentum, nesterov=momentum > 0)
        self.images, self.stop = 0, False  # of all ranks in this round; whether this rank was asked to stop
        self.overlap = config.overlap
        self.exchange: Exchange | None = None

    @property
    def under_way(self) -> bool:
        return self.exchange is not None

    def gradients(self, batch: Batch, count: int, step: int, stop: bool) -> None:
        """The gradient of the mean loss over `batch`, this rank's share of `count` images; zeros for an empty one."""
        pixels, labels = normalise(batch[0], self.objective.spec), batch[1]
        for part, place in self.sharding.slices(count):
            self.enter("forward")
            with self.autocast():
                total = self.objective.total(pixels[place], labels[place], step, part)
            self.enter("backward")
            backward(self.accelerator, total / max(1, len(labels)))
            self.own_losses.append(total.detach())
        self.images, self.stop = self.images + count, stop

    def end_round(self, networks: Sequence[nn.Module], step: int, together: bool) -> Agreed | None:
        """Exchanges this round's differences. Collective: every rank must call it.

        What is agreed on is the mean loss over all images of a round, this one or, with `sync.overlap`, the one before; None
        where that has none. `together` has this one taken in at once, so that all ranks have equal weights. `networks` are the
        model and, if there is one, its moving average, which is averaged like a buffer.

        Raises:
            Fault: a loss is not finite; no rank has taken in the weights that it made.
        """
        self.enter("sync")
        agreed = self._take_in(step)
        self._send(networks)
        if together or not self.overlap:
            now = self._take_in(step)
            assert now is not None
            agreed = Agreed(now.loss, now.stops + (agreed.stops if agreed else 0.0))
        return agreed

    def settle(self, step: int) -> None:
        """Takes in what is under way, so that all ranks have equal weights. Collective: every rank must call it."""
        self._take_in(step)

    @torch.no_grad()
    def _send(self, networks: Sequence[nn.Module]) -> None:
        others = [t for t in networks[0].buffers() if t.is_floating_point()]
        others += [t for network in networks[1:] for t in network.state_dict().values() if t.is_floating_point()]
        loss = torch.stack(self.own_losses).sum()
        differences = [common - own for common, own in zip(self.common, self.parameters, strict=True)]
        told = torch.stack([loss, loss.new_tensor(float(self.stop))])
        message = torch.cat([t.flatten() for t in (*differences, *others, told)])
        work = dist.all_reduce(message, async_op=True) if self.world_size > 1 else None
        targets = [*self.parameters, *others]
        self.exchange = Exchange(message, targets, [t.clone() for t in targets], self.own_losses, self.images, work)
        self.own_losses, self.images = [], 0

    @torch.no_grad()
    def _take_in(self, step: int) -> Agreed | None:
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return None
        if exchange.work:
            exchange.work.wait()
        total, stops = exchange.message[-2:].tolist()
        agreed = Agreed(total / exchange.images, stops)
        check_finite(agreed, exchange.losses, step)
        pieces = (exchange.message[:-2] / self.world_size).split([t.numel() for t in exchange.targets])
        means = [piece.view(t.shape) for piece, t in zip(pieces, exchange.targets, strict=True)]
        for common, difference in zip(self.common, means, strict=False):
            common.grad = difference
        self.outer.step()
        agreed_on = [*self.common, *means[len(self.common) :]]
        for target, value, sent in zip(exchange.targets, agreed_on, exchange.sent, strict=True):
            target.copy_(value + (target - sent))
        return agreed

    def agree_on_buffers(self, networks: Sequence[nn.Module]) -> None:
        """Nothing to do: what is under way is taken in before they are needed."""

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        """The outer momentum, and the optimizer of each rank, which are as different as what they have seen. Collective."""
        return {"outer": optim.state_tensors(self.outer)} | _of_all_ranks("optimizer", optim.state_tensors(optimizer))

    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer) -> None:
        """Takes back what `state` gave; on another world size every rank goes on with the main rank's optimizer."""
        for common, own in zip(self.common, self.parameters, strict=True):
            common.copy_(own.detach())
        optim.load_state_tensors(self.outer, stored.get("outer", {}))
        theirs = _of_this_rank("optimizer", stored, self.rank, self.world_size)
        if theirs is not None:
            optim.load_state_tensors(optimizer, theirs)


def _of_all_ranks(name: str, own: Tensors) -> dict[str, Tensors]:
    """What each rank has of its own, as groups of a checkpoint. Collective: every rank must call it."""
    gathered = gather_object([{key: tensor.cpu() for key, tensor in own.items()}])
    return {f"{name}-rank-{rank}": theirs for rank, theirs in enumerate(gathered)}


def _of_this_rank(name: str, stored: dict[str, Tensors], rank: int, world_size: int) -> Tensors | None:
    """This rank's group of those that `_of_all_ranks` gave, where there were as many ranks as now."""
    groups = [group for group in stored if group.startswith(f"{name}-rank-")]
    return dict(stored[f"{name}-rank-{rank}"]) if len(groups) == world_size else None


class Tree:
    """A binary tree sum over leaves 0, 1, 2, … that come in this order, from any first one on.

    Like a binary counter, it merges two neighbours of equal size whose first leaf is a multiple of their joint size, so
    which sums are formed depends on the leaves' numbers alone; it holds at most two nodes of each size.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[int, int, Tensor]] = []  # first leaf, number of leaves, their sum

    def add(self, start: int, size: int, value: Tensor) -> None:
        """Adds the node of leaves `start` to `start + size - 1`; `value` may be changed in place."""
        while self.nodes and self.nodes[-1][1] == size and self.nodes[-1][0] % (2 * size) == 0:
            start, _, left = self.nodes.pop()
            value, size = left.add_(value), 2 * size
        self.nodes.append((start, size, value))

    def root(self) -> Tensor:
        """The sum of all leaves; the tree is used up."""
        _, _, value = self.nodes.pop()
        while self.nodes:
            _, _, left = self.nodes.pop()
            value = left.add_(value)
        return value


class BatchStatistics:
    """BatchNorm's running statistics, taken from each leaf apart and folded in the order of leaves."""

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
            norm.momentum = 1.0  # after a forward, the buffers then hold the statistics of that batch alone

    def begin(self) -> None:
        """Remembers the running statistics before the forward passes of a step."""
        self.running, self.counts_before = self.of_last_forward(), [count.clone() for count in self.counts]

    def of_last_forward(self) -> Tensor:
        return torch.cat(self.buffers) if self.buffers else self.momentum

    def fold(self, rows: list[Tensor]) -> None:
        """Folds the statistics of all leaves of a step, in their order, into the running ones."""
        if not self.buffers:
            return
        for row in rows:
            self.running.lerp_(row, self.momentum)
        for buffer, value in zip(self.buffers, self.running.split([len(b) for b in self.buffers]), strict=True):
            buffer.copy_(value)
        for count, before in zip(self.counts, self.counts_before, strict=True):
            count.copy_(before + len(rows))


class Hardness:
    """The loss of each training image at its last visit, by which a focused pass chooses; all ranks know what was noted
    before this stretch, and each what it has noted since."""

    def __init__(self, images: ImageSet):
        self.indices = images.indices
        self.known = torch.full((int(self.indices.max()) + 1,), math.inf, device=self.indices.device)
        self.noted = torch.full_like(self.known, math.nan)

    def note(self, indices: Tensor, losses: list[Tensor]) -> None:
        """Notes this rank's part of a step, and takes it out of `losses`."""
        if losses:
            self.noted[indices] = torch.cat(losses)
            losses.clear()

    def meet(self) -> None:
        """Makes known what all ranks have noted. Collective: every rank must call it."""
        noted = self._noted_by_all()
        self.known = torch.where(noted.isnan(), self.known, noted)
        self.noted.fill_(math.nan)

    def hardest(self) -> Tensor:
        """The places of all images by falling loss, those never visited first: int64 [count]."""
        return self.known[self.indices].argsort(descending=True, stable=True)

    def state(self) -> Tensors:
        """Collective: every rank must call it."""
        return {"known": self.known, "noted": self._noted_by_all()}

    def restore(self, stored: Tensors, is_main: bool) -> None:
        """Takes back what `state` gave, where it is of the same images."""
        if len(stored.get("known", ())) == len(self.known):
            self.known.copy_(stored["known"])
            if is_main:
                self.noted.copy_(stored["noted"])

    def _noted_by_all(self) -> Tensor:
        """No image is visited twice in a stretch, so that the sum over ranks is what one of them has noted. Collective."""
        both = torch.stack([self.noted.nan_to_num(), (~self.noted.isnan()).float()])
        if dist.is_initialized():
            dist.all_reduce(both)
        return torch.where(both[1] > 0, both[0], math.nan)


def build(config: Config, accelerator: Accelerator, model: nn.Module, enter: Enter) -> GradientSync:
    """The configured way to agree. Collective in `ddp` mode."""
    objective = Objective(model, config).to(accelerator.device)
    if config.sync.mode == "exact":
        return Exact(accelerator, objective, config.sync.shards * config.train.accumulate, enter)
    if config.sync.mode == "local":
        return Local(accelerator, objective, config.train.accumulate, config.sync, enter)
    return Ddp(accelerator, objective, config.train.accumulate, config.sync.compress, enter)


def _register_hook(wrapped: DistributedDataParallel, compress: str, device: torch.device) -> PowerSGDState | None:
    """Has DistributedDataParallel send gradients in PyTorch's own compressed ways; the state of PowerSGD where it has one.

    PowerSGD (Vogels et al., 2019) sends a matrix as the product of two of rank 2, and adds what that has lost to the next
    gradient. Its first steps are sent whole. Two ranks on CPUs that compress nothing exchange their gradients.
    """
    if compress == "none":
        if dist.get_world_size() == 2 and device.type == "cpu":
            wrapped.register_comm_hook(None, lambda state, bucket: _exchange_and_add(bucket))
        return None
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if compress == "powersgd":
        power = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=10)
        wrapped.register_comm_hook(power, powerSGD_hook.powerSGD_hook)
        return power
    hooks = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
    wrapped.register_comm_hook(None, hooks[compress])
    return None


def _exchange_and_add(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook for two ranks: the mean of both gradients, by one message each way.

    A ring all-reduce sends as many bytes, but waits for its neighbour several times: on gloo, 0.65 against 0.75 ms or more.
    """
    own = bucket.buffer()
    both = [torch.empty_like(own), torch.empty_like(own)]
    dist.all_gather(both, own)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(torch.add(*both, out=own).div_(2))
    return done


def slowest_rank(accelerator: Accelerator, seconds: float) -> tuple[int, float]:
    """The rank that has needed most `seconds` of its own, and by what part more than the median of the others. Collective."""
    own = accelerator.gather(torch.tensor([seconds], device=accelerator.device)).tolist()
    slowest = own.index(max(own))
    others = statistics.median(own[:slowest] + own[slowest + 1 :])
    return slowest, own[slowest] / others - 1 if others else 0.0


def check_equal(tensors: dict[str, Tensor], step: int) -> None:
    """Compares a hash of `tensors` over all ranks. Collective: every rank must call it.

    Raises:
        Fault: they differ; it names the rank and the first tensor that does.
    """
    if len(set(gather_object([weights_sha256(tensors)]))) == 1:
        return
    hashes = gather_object([{name: weights_sha256({name: tensor}) for name, tensor in tensors.items()}])
    for rank, theirs in enumerate(hashes):
        for name in tensors:
            if theirs[name] != hashes[0][name]:
                raise Fault(f"step {step}: rank {rank} and rank 0 differ in {name}; their weights must be equal")


def check_finite(agreed: Agreed, own_losses: Sequence[Tensor], step: int) -> None:
    """Stops all ranks together where the loss is not finite, before it has reached a weight. Collective in that case.

    Raises:
        Fault: naming step and rank.
    """
    if math.isfinite(agreed.loss):
        return
    finite = gather_object([all(math.isfinite(float(loss)) for loss in own_losses)])
    ranks = [str(rank) for rank, fine in enumerate(finite) if not fine] or ["none alone"]
    raise Fault(
        f"the loss of step {step} is {agreed.loss}, on rank {', '.join(ranks)}; the weights are those of step {step - 1}."
        " A lower optim.lr or optim.clip_norm=1 may help"
    )
