"""Where a rank is in a round of ``sync.mode=local``: what it has of its own, and what ranks exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from digitdist.checkpoint import Tensors
from digitdist.sync.messages import unpack


@dataclass
class Exchange:
    """What a rank has sent at the end of a round, until the sum over all ranks is taken in."""

    parts: list[Tensor]  # of each weight: global - this rank's; then the other tensors, the loss and the request to stop
    messages: dict[torch.dtype, Tensor]  # what has been sent of them
    networks: Sequence[nn.Module]
    sent: list[Tensor]  # this rank's weights, then the other tensors, as they were then
    losses: list[Tensor]
    num_images: int
    work: list[dist.Work] = field(default_factory=list)

    def wait(self) -> None:
        """Waits until `messages` are the sums over all ranks. Collective."""
        while self.work:
            self.work.pop().wait()


@dataclass
class Round:
    """Where a rank goes on: its own weights, moving average and buffers by name, the global weights and the momentum of the
    outer step, which are the same on all ranks, the losses and images of the round so far, and what is in flight."""

    networks: Sequence[nn.Module]
    values: Tensors
    global_params: list[Tensor]
    momentum: Tensors
    losses: list[Tensor]
    num_images: int
    exchange: Exchange | None

    @property
    def is_open(self) -> bool:
        """Whether ranks have done something that is not in the global weights."""
        return self.num_images > 0 or self.exchange is not None

    def shared_tensors(self) -> Tensors:
        """What is the same on all ranks, for a checkpoint; a round that is open has it. Collective where one is in flight."""
        tensors = {f"global.{number}": value for number, value in enumerate(self.global_params)}
        tensors |= {f"outer.{name}": value for name, value in self.momentum.items()}
        tensors["num_images"] = torch.tensor(self.num_images)
        if self.exchange:
            self.exchange.wait()
            tensors |= {f"message.{str(kind).removeprefix('torch.')}": m for kind, m in self.exchange.messages.items()}
            tensors["message_images"] = torch.tensor(self.exchange.num_images)
        return tensors

    def own_tensors(self) -> Tensors:
        """What is this rank's own, for a checkpoint that has the equal weights: what differs from them."""
        now = named_tensors(self.networks)
        tensors = {f"value.{name}": value for name, value in self.values.items() if not _same(value, now[name])}
        if self.is_open:
            tensors["losses"] = _joined(self.losses)
        if self.exchange:
            tensors["message_losses"] = _joined(self.exchange.losses)
            tensors |= {f"sent.{number}": value for number, value in enumerate(self.exchange.sent)}
        return tensors

    def restore(self, shared: Tensors, own: Tensors, like: list[Tensor]) -> None:
        """Takes over what `shared_tensors` (empty where the round was not open) and `own_tensors` returned, on the device of
        `like`, which are the weights and the other tensors that are exchanged."""
        device = like[0].device
        shared, own = ({name: value.to(device) for name, value in tensors.items()} for tensors in (shared, own))
        self.values |= {name: own.get(f"value.{name}", value) for name, value in self.values.items()}
        if not shared:
            return
        self.global_params = [shared[f"global.{number}"] for number in range(len(self.global_params))]
        self.momentum = {name.removeprefix("outer."): v for name, v in shared.items() if name.startswith("outer.")}
        self.losses, self.num_images = list(own["losses"]), int(shared["num_images"])
        if "message_images" not in shared:
            return
        messages = {getattr(torch, n.removeprefix("message.")): v for n, v in shared.items() if n.startswith("message.")}
        sent = [own[f"sent.{number}"] for number in range(len(like))]
        parts = [*like, torch.zeros(2, device=device)]
        unpack(messages, parts)[-1][1] = 0  # who was asked to stop has stopped
        losses, num_images = list(own["message_losses"]), int(shared["message_images"])
        self.exchange = Exchange(parts, messages, self.networks, sent, losses, num_images)


def named_tensors(networks: Sequence[nn.Module]) -> Tensors:
    """The parameters and buffers of all `networks` by number and name; tied ones once."""
    return {
        f"{number}.{name}": tensor
        for number, network in enumerate(networks)
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal to the bit, NaN and the sign of 0 included."""
    bits = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def _joined(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses) if losses else torch.zeros(0)
