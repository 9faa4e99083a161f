"""The strategies: how ranks agree on the gradient of a global batch.

A new one is a subclass of `Strategy` in a file of its own, a line in `STRATEGIES`, and its name in the schema's `sync.mode`.
"""

from collections.abc import Callable

from accelerate import Accelerator
from torch import nn

from digitdist.config import Config
from digitdist.data import DataSetInfo, LossHistory, NullLossHistory
from digitdist.sync.ddp import Ddp
from digitdist.sync.exact import Exact
from digitdist.sync.local import Local
from digitdist.sync.loss import TrainingLoss
from digitdist.sync.strategy import OF_A_RANK, Phase, StepStats, Strategy, check_finite

Build = Callable[[Accelerator, TrainingLoss, Phase, Config], Strategy]
STRATEGIES: dict[str, Build] = {"ddp": Ddp, "exact": Exact, "local": Local}


def build_strategy(
    config: Config,
    accelerator: Accelerator,
    model: nn.Module,
    info: DataSetInfo,
    loss_history: LossHistory | NullLossHistory,
    phase: Phase,
    one_graph: bool = True,
) -> Strategy:
    """The configured strategy for `model`, which is on the accelerator's device; `one_graph` is that of `TrainingLoss`.
    Collective: every rank must call it."""
    loss = TrainingLoss(model, config, info, loss_history, one_graph).to(accelerator.device)
    return STRATEGIES[config.sync.mode](accelerator, loss, phase, config)


__all__ = ["OF_A_RANK", "STRATEGIES", "StepStats", "Strategy", "build_strategy", "check_finite"]
