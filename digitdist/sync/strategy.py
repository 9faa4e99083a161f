"""What all strategies have in common: how ranks agree on the gradient of a global batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from digitdist.checkpoint import Tensors
from digitdist.data import Batch, Sharding
from digitdist.errors import Fault
from digitdist.sync.loss import TrainingLoss

OF_A_RANK = "-rank-"  # in the name of a group of a checkpoint that is one rank's own
Phase = Callable[..., None]  # begins a phase of a step, now or at the time in its second argument


@dataclass(frozen=True)
class StepStats:
    """What all ranks know after they have synchronised: the mean loss of the images since they did so last, and how many ranks
    were asked to stop."""

    loss: float
    stop_requests: float

    @classmethod
    def read(cls, values: Tensor) -> StepStats:
        """From float32 [2], for whose device the host waits."""
        return cls(*values.tolist())

    @property
    def stop_requested(self) -> bool:
        return self.stop_requests > 0


class Strategy(ABC):
    """How ranks agree on a step. Gradients are left in ``.grad`` of every parameter.

    A parameter that takes no part in a step has a gradient of 0 there, in every mode. `parameters`: those that are trained.
    `own_losses`: the summed losses of this rank's micro-batches since ranks last synchronised.
    """

    def __init__(self, accelerator: Accelerator, loss: TrainingLoss, phase: Phase, num_micro_batches: int):
        self.accelerator, self.loss, self.phase = accelerator, loss, phase
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.shardings = Sharding.of_all_ranks(self.world_size, num_micro_batches)
        self.sharding = self.shardings[self.rank]
        self.parameters = loss.trained
        self.own_losses: list[Tensor] = []

    def fill_gradients(self) -> None:
        """Gives a gradient of 0 to each parameter that took no part in the loss."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @property
    def ranks_differ(self) -> bool:
        """Whether ranks go on by themselves, so that their weights differ."""
        return False

    @abstractmethod
    def synchronises(self, step: int, make_equal: bool) -> bool:
        """Whether ranks synchronise at `step`; with `make_equal` they must."""

    @abstractmethod
    def compute_gradients(self, batch: Batch, count: int, step: int, stop: bool) -> Tensor | None:
        """The gradients of the step that follows `step`, from this rank's share of a global batch of `count` images.

        Returns the values of a `StepStats`, float32 [2] on the device; None where ranks go on by themselves, until
        `sync_round`. No host waits for its device. Collective: every rank must call it, also with an empty share.
        """

    @abstractmethod
    def sync_round(self, networks: Sequence[nn.Module], step: int, make_equal: bool, look: bool) -> StepStats | None:
        """Called after each update, for strategies that synchronise only now and then. Collective.

        `networks` are the model and, if there is one, its moving average; with `make_equal` all ranks must end with equal
        weights until they train on, since they are evaluated or saved. Without `look` no host waits for its device, and no
        stats are returned.
        """

    @abstractmethod
    def make_equal(self, networks: Sequence[nn.Module], step: int) -> None:
        """Makes weights and buffers equal on all ranks until they train on, before they are evaluated or saved. It has no
        influence on what is trained. Collective."""

    @abstractmethod
    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        """What a checkpoint needs beside the equal weights and the main rank's optimizer: groups of tensors. Collective."""

    @abstractmethod
    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer, networks: Sequence[nn.Module]) -> None:
        """Restores what `state` returned, after all else is restored."""


class SynchronousStrategy(Strategy):
    """What strategies have in common in which ranks synchronise in every step."""

    def synchronises(self, step: int, make_equal: bool) -> bool:
        return True

    def sync_round(self, networks: Sequence[nn.Module], step: int, make_equal: bool, look: bool) -> StepStats | None:
        return None

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensors]:
        return {}

    def restore(self, stored: dict[str, Tensors], optimizer: torch.optim.Optimizer, networks: Sequence[nn.Module]) -> None:
        pass


def check_finite(stats: StepStats, own_losses: Sequence[Tensor], step: int) -> None:
    """Ends all ranks together where the loss is not finite, before it has reached a weight. Collective in that case.

    Raises:
        Fault: naming step and rank.
    """
    if math.isfinite(stats.loss):
        return
    finite = gather_object([all(math.isfinite(float(loss)) for loss in own_losses)])
    ranks = [str(rank) for rank, is_finite in enumerate(finite) if not is_finite] or ["none alone"]
    raise Fault(
        f"the loss of step {step} is {stats.loss}, on rank {', '.join(ranks)}; the weights are those of step {step - 1}."
        " A lower optim.lr or optim.clip_norm=1 may help"
    )


def gather_state(name: str, own: Tensors) -> dict[str, Tensors]:
    """Each rank's `own` tensors as groups of a checkpoint. Collective: every rank must call it."""
    gathered = gather_object([{key: tensor.cpu() for key, tensor in own.items()}])
    return {f"{name}{OF_A_RANK}{rank}": theirs for rank, theirs in enumerate(gathered)}


def own_state(name: str, stored: dict[str, Tensors], rank: int, world_size: int) -> Tensors | None:
    """This rank's group of those that `gather_state` returned; None if there were not as many ranks as now."""
    groups = [group for group in stored if group.startswith(f"{name}{OF_A_RANK}")]
    return dict(stored[f"{name}{OF_A_RANK}{rank}"]) if len(groups) == world_size else None
