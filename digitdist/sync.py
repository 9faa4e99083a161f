"""The ways in which ranks agree on the gradient of a global batch.

Both leave in ``.grad`` of every parameter, on every rank, the gradient of the mean loss over the whole global batch, and
return what was agreed on the way: the loss, and whether a rank was asked to stop. These travel with the gradients, so
that a step has no collective of its own for them.

* `Ddp`: DistributedDataParallel, as Accelerate prepares it.
* `Exact`: fixed shards, their gradients summed in one fixed binary tree: the same bits for any world size.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from digitdist.checkpoint import weights_sha256
from digitdist.config import AugmentConfig, Config, UserError
from digitdist.data import SPECS, Batch, Sharding, Spec, augment, key_of, normalise
from digitdist.runtime import Fault

Enter = Callable[..., None]  # told each phase of a step as it begins, with the time where that was earlier


@dataclass(frozen=True)
class Agreed:
    """What every rank knows after a step's gradients have met: mean loss of the global batch, ranks asked to stop."""

    loss: float
    stops: float


class GradientSync(Protocol):
    sharding: Sharding
    own_losses: list[Tensor]  # of this rank's parts of the last step

    def gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Agreed: ...

    def agree_on_buffers(self, modules: Sequence[nn.Module]) -> None: ...


class Objective(nn.Module):
    """The training loss of one part of a global batch: seeds the generators, normalises, augments, runs the model.

    `signal` is a parameter that is always 0 and that no optimizer knows. Its gradient is whatever the loss multiplies it
    with, and so carries numbers through the gradients' all-reduce.
    """

    def __init__(self, model: nn.Module, spec: Spec, augment: AugmentConfig, label_smoothing: float, seed: int):
        super().__init__()
        self.model, self.spec, self.augment = model, spec, augment
        self.label_smoothing, self.seed = label_smoothing, seed
        self.signal = nn.Parameter(torch.zeros(2))

    def total(self, pixels: Tensor, labels: Tensor, step: int, part: int) -> Tensor:
        """The summed loss, a float32 scalar, of `pixels` as `normalise` gives them, with labels int64 [n].

        Dropout and augmentation draw from generators keyed by (seed, step, part), whichever rank runs the part.
        """
        if not len(pixels):
            return sum((p.sum() * 0 for p in self.model.parameters()), torch.zeros((), device=pixels.device))
        seed_generators(key_of(self.seed, step, part), pixels.device)
        logits = self.model(augment(pixels, self.augment, -self.spec.mean / self.spec.std))
        return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=self.label_smoothing)

    def forward(self, images: Tensor, labels: Tensor, step: int, part: int, scale: float, stop: float) -> Tensor:
        """`scale` times the summed loss, with the summed loss and `stop` put into the gradient of `signal`."""
        total = self.total(normalise(images, self.spec), labels, step, part)
        carried = torch.stack([total.detach(), total.new_tensor(stop)])
        return total * scale + (self.signal * carried).sum()


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds torch's generators of the CPU and of `device`: `torch.manual_seed` without its 0.2 ms for devices not in use."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class Ddp:
    """DistributedDataParallel, and plain backward on one process."""

    def __init__(self, accelerator: Accelerator, objective: Objective, accumulate: int, enter: Enter):
        self.accelerator, self.enter = accelerator, enter
        self.world_size = accelerator.num_processes
        self.sharding = Sharding.of(accumulate * self.world_size, accelerator.process_index, self.world_size)
        self.own_losses: list[Tensor] = []
        self.signal = objective.signal
        # From when the last gradient is there, backward only waits for the other ranks. (On a GPU the host cannot see that.)
        self.ready: float | None = None
        if self.world_size > 1 and accelerator.device.type == "cpu":
            for parameter in objective.parameters():
                parameter.register_post_accumulate_grad_hook(self._note_ready)
        # On one process it would only import much.
        self.wrapped = accelerator.prepare_model(objective) if self.world_size > 1 else objective
        self._settle_buckets(accelerator.device)

    def gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Agreed:
        """Collective: every rank must call it, also with an empty share.

        `batch` is this rank's share of a global batch of `count` images. The loss is the sum over images divided by
        `count`, times the world size, since DistributedDataParallel averages over ranks; parts may thus be unequal.
        """
        images, labels, _ = batch
        self.signal.grad, self.own_losses = None, []
        parts = list(self.sharding.slices(count))
        for part, place in parts:
            last = part == parts[-1][0]
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                self.enter("forward")
                with self.accelerator.autocast():
                    loss = self.wrapped(images[place], labels[place], step, part, self.world_size / count, float(stop and last))
                self.enter("backward")
                self.accelerator.backward(loss)
            self.own_losses.append(loss.detach())
        _await_device(self.accelerator.device)
        self.enter("sync", self.ready)
        carried = self.signal.grad
        assert carried is not None
        scaler = self.accelerator.scaler
        total, stops = (carried * (self.world_size / (scaler.get_scale() if scaler else 1.0))).tolist()
        return Agreed(total / count, stops)

    def _note_ready(self, parameter: Tensor) -> None:
        self.ready = time.perf_counter()

    def _settle_buckets(self, device: torch.device) -> None:
        """Runs a step without images. Collective.

        DistributedDataParallel rebuilds its buckets once, after its first step, and sums in another order from then on: the
        first step after a restart would have other bits than it had without.
        """
        if self.world_size > 1:
            images, labels = torch.zeros(0, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
            self.wrapped(images.to(device), labels.to(device), 0, 0, 0.0, 0.0).backward()
            self.wrapped.zero_grad()

    def agree_on_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Sends rank 0's buffers to all, as DistributedDataParallel would before each forward. Collective.

        BatchNorm's running statistics do not enter training, so that it is enough to do it before they are used.
        """
        if self.world_size > 1:
            for buffer in (buffer for module in modules for buffer in module.buffers()):
                dist.broadcast(buffer, src=0)


class Exact:
    """Gradients with the same bits for any world size up to the number of shards.

    A global batch is cut into `shards * accumulate` fixed parts, the leaves of one fixed binary tree. A rank runs a
    stretch of leaves one at a time and merges two nodes as soon as both are there, so that it keeps few gradients; then
    the ranks' nodes meet, and the tree is finished in the same order whoever computed what.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, leaves: int, enter: Enter):
        self.accelerator, self.objective, self.enter = accelerator, objective, enter
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.sharding = Sharding.of(leaves, self.rank, self.world_size)
        self.own_losses: list[Tensor] = []
        self.parameters = list(objective.model.parameters())
        others = {p.dtype for p in self.parameters} - {torch.float32}
        if others:
            raise UserError(f"sync.mode=exact sums float32 gradients, this model has {others.pop()}; use sync.mode=ddp")
        self.statistics = BatchStatistics(objective.model)

    def gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Agreed:
        """Collective: every rank must call it, also with an empty share. `batch` is its share of `count` images."""
        pixels, labels = normalise(batch[0], self.objective.spec), batch[1]
        tree, rows, scaler = Tree(), [], self.accelerator.scaler
        self.own_losses = []
        self.statistics.begin()
        for leaf, place in self.sharding.slices(count):
            if place.start == place.stop:
                continue  # the last leaves of a small batch are empty, for every world size
            self.enter("forward")
            with self.accelerator.autocast():
                total = self.objective.total(pixels[place], labels[place], step, leaf)
            self.enter("backward")
            loss = scaler.scale(total / count) if scaler else total / count
            pieces = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            self.own_losses.append(total.detach())
            tree.add(leaf, 1, torch.cat([*(piece.flatten() for piece in pieces), total.detach().view(1)]))
            rows.append(self.statistics.of_last_forward())
        _await_device(self.accelerator.device)
        self.enter("sync")
        vector, all_rows, stops = self._meet(tree, rows, float(stop), min(count, self.sharding.parts))
        self.statistics.fold(all_rows)
        at = 0
        for parameter in self.parameters:
            piece = vector[at : at + parameter.numel()].view(parameter.shape)
            parameter.grad = torch.empty_like(parameter).copy_(piece)  # in the parameter's own memory layout
            at += parameter.numel()
        return Agreed(float(vector[-1]) / count, stops)

    def agree_on_buffers(self, modules: Sequence[nn.Module]) -> None:
        """Nothing to do: every rank has folded the same statistics."""

    def _meet(self, tree: Tree, rows: list[Tensor], stop: float, leaves: int) -> tuple[Tensor, list[Tensor], float]:
        """The root of the tree, the statistics of all `leaves` in their order, the sum of all `stop`. Collective.

        As in a ring all-reduce, each rank first gets one slice of every node, finishes the tree on it, and then all
        gather the slices: 2·(W-1)/W of a gradient sent by each rank where W is a power of two that divides the leaves,
        and every rank thus holds one node; up to the number of its nodes times that elsewhere.
        """
        if self.world_size == 1:
            return tree.root(), rows, stop
        length = sum(p.numel() for p in self.parameters) + 1
        width = -(-length // self.world_size)
        device = self.parameters[0].device
        own = torch.zeros(len(tree.nodes), self.world_size * width, device=device)
        for row, (_, _, value) in zip(own, tree.nodes, strict=True):
            row[:length] = value
        nodes = [self._nodes_of(rank, leaves) for rank in range(self.world_size)]
        sizes = [len(n) * width for n in nodes]
        received = torch.empty(sum(sizes), device=device)
        by_rank = own.view(-1, self.world_size, width).transpose(0, 1).contiguous().flatten()
        dist.all_to_all_single(received, by_rank, sizes, [sizes[self.rank]] * self.world_size)
        finished = Tree()
        for (start, size), value in zip((node for n in nodes for node in n), received.view(-1, width), strict=True):
            finished.add(start, size, value)

        counts = [len(self._leaves_of(rank, leaves)) for rank in range(self.world_size)]
        statistics = torch.zeros(max(counts), self.statistics.length, device=device)
        if rows:
            statistics[: len(rows)] = torch.stack(rows)
        message = torch.cat([finished.root(), statistics.flatten(), torch.tensor([stop], device=device)])
        gathered = [torch.empty_like(message) for _ in range(self.world_size)]
        dist.all_gather(gathered, message)
        root = torch.cat([g[:width] for g in gathered])[:length]
        all_rows = [row for g, n in zip(gathered, counts, strict=True) for row in g[width:-1].view(statistics.shape)[:n]]
        return root, all_rows, float(sum(g[-1] for g in gathered))

    def _leaves_of(self, rank: int, leaves: int) -> range:
        """The leaves of `rank` that hold an image, where the first `leaves` do."""
        mine = Sharding.of(self.sharding.parts, rank, self.world_size).mine
        return range(min(mine.start, leaves), min(mine.stop, leaves))

    def _nodes_of(self, rank: int, leaves: int) -> list[tuple[int, int]]:
        tree = Tree()
        for leaf in self._leaves_of(rank, leaves):
            tree.add(leaf, 1, torch.empty(0))
        return [(start, size) for start, size, _ in tree.nodes]


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


def build(config: Config, accelerator: Accelerator, model: nn.Module, enter: Enter) -> GradientSync:
    """The configured way to agree. Collective in `ddp` mode."""
    spec = SPECS[config.data.name]
    objective = Objective(model, spec, config.augment, config.train.label_smoothing, config.seed)
    objective.to(accelerator.device)
    if config.sync.mode == "exact":
        return Exact(accelerator, objective, config.sync.shards * config.train.accumulate, enter)
    return Ddp(accelerator, objective, config.train.accumulate, enter)


def _await_device(device: torch.device) -> None:
    """Waits for what the host has asked of `device`, as a step's loss will anyway: this is not time of the ranks' meeting."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


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
