"""The moving average of the weights, which is evaluated in place of the weights themselves."""

from __future__ import annotations

import copy

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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
    """An exponential moving average of all weights, with `decay` a step; buffers are those of the network.

    `eval_model` is what is evaluated; `networks` are all that ranks must make equal.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.average.n_averaged = self.average.n_averaged.cpu()  # which is read in each update
        self.eval_model: nn.Module = self.average.module
        self.networks = [model, self.eval_model]
        self.counts = [p for p in model.parameters() if not p.is_floating_point()]  # which have no average
        self.averaged_counts = [p for p in self.eval_model.parameters() if not p.is_floating_point()]
        self.with_extra_state = [
            (theirs, ours)
            for theirs, ours in zip(model.modules(), self.eval_model.modules(), strict=True)
            if type(theirs).get_extra_state is not nn.Module.get_extra_state
        ]

    def update(self) -> None:
        """Takes in the weights after a step."""
        self.average.update_parameters(self.model)
        for ours, theirs in zip(self.averaged_counts, self.counts, strict=True):
            ours.detach().copy_(theirs)
        for model, average in self.with_extra_state:
            average.set_extra_state(copy.deepcopy(model.get_extra_state()))

    def state(self) -> dict[str, Tensors]:
        return {"ema": model_state(self.eval_model)}

    def restore(self, stored: dict[str, Tensors], step: int) -> None:
        load_model_state(self.eval_model, stored["ema"])
        load_transient_buffers(self.eval_model, stored.get("transient", {}))
        self.average.n_averaged.fill_(step)


def build_average(model: nn.Module, decay: float) -> MovingAverage | NullAverage:
    """The moving average of `model` with `decay`; none for 0."""
    return MovingAverage(model, decay) if decay else NullAverage(model)
