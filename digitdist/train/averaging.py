"""The moving average of the weights, which is evaluated in place of the weights themselves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from digitdist.checkpoint import Tensors
from digitdist.model_state import load_model_state, load_transient_buffers, model_state


class NullAverage:
    """Stands in where there is no moving average: the network itself is evaluated."""

    def __init__(self, model: nn.Module):
        self.eval_model = model
        self.networks = [model]

    def update(self) -> None:
        pass

    def state(self) -> dict[str, Tensors]:
        return {}

    def restore(self, stored: dict[str, Tensors], step: int) -> None:
        pass


class MovingAverage:
    """An exponential moving average of all weights, with `decay` a step, also one that fp16 skips; buffers are the network's.

    `eval_model` is what is evaluated; `networks` are all that ranks must make equal.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.begun = model, decay, False
        self.eval_model: nn.Module = copy.deepcopy(model)
        self.networks = [model, self.eval_model]
        self.averages: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.counts: list[tuple[Tensor, Tensor]] = []  # which have no average
        for ours, theirs in zip(self.eval_model.parameters(), model.parameters(), strict=True):
            if ours.is_floating_point() or ours.is_complex():
                self.averages.append(ours)
                self.weights.append(theirs)
            else:
                self.counts.append((ours, theirs))
        self.with_extra_state = [
            (theirs, ours)
            for theirs, ours in zip(model.modules(), self.eval_model.modules(), strict=True)
            if type(theirs).get_extra_state is not nn.Module.get_extra_state
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step, without waiting for their device. After the first step they are the average."""
        if self.begun:
            torch._foreach_lerp_(self.averages, self.weights, 1 - self.decay)
        else:
            torch._foreach_copy_(self.averages, self.weights)
            self.begun = True
        for ours, theirs in (*self.counts, *zip(self.eval_model.buffers(), self.model.buffers(), strict=True)):
            ours.copy_(theirs)
        for model, average in self.with_extra_state:
            average.set_extra_state(copy.deepcopy(model.get_extra_state()))

    def state(self) -> dict[str, Tensors]:
        return {"ema": model_state(self.eval_model)}

    def restore(self, stored: dict[str, Tensors], step: int) -> None:
        """Takes over the stored average; without one the weights, as they are restored, are the average of the next step."""
        load_model_state(self.eval_model, stored.get("ema", model_state(self.model)))
        load_transient_buffers(self.eval_model, stored.get("transient", {}))
        self.begun = step > 0 and "ema" in stored


def build_average(model: nn.Module, decay: float) -> MovingAverage | NullAverage:
    """The moving average of `model` with `decay`; none for 0."""
    return MovingAverage(model, decay) if decay else NullAverage(model)
