"""What is trained, and what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from digitdist.checkpoint import Checkpoint, Tensors
from digitdist.config import as_dict
from digitdist.data import AnySet, LossHistory, NullLossHistory
from digitdist.distributed import Heartbeat, PhaseTimer
from digitdist.errors import Fault
from digitdist.model_state import load_model_state, load_transient_buffers, model_state, transient_buffers
from digitdist.optim import build_optimizer, load_state_tensors, state_tensors
from digitdist.sync import Strategy, build_strategy
from digitdist.train.averaging import MovingAverage, NullAverage, build_average
from digitdist.train.setup import Setup


@dataclass
class TrainingState:
    """Everything that the rest of a training depends on, and its position: `step` updates have been made.

    `best` is the step and accuracy of the best evaluation on held-out images; `attempt` is stored with each checkpoint.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: MovingAverage | NullAverage
    strategy: Strategy
    loss_history: LossHistory | NullLossHistory
    scaler: torch.amp.GradScaler | None
    timer: PhaseTimer
    attempt: dict[str, Any]
    finite: frozenset[str] = frozenset()  # what the network holds that was finite when it was built; a mask may not be
    step: int = 0
    earlier_seconds: float = 0.0  # of training, in earlier attempts
    best: dict[str, Any] | None = None

    @property
    def train_seconds(self) -> float:
        """Wall time of the training steps alone, those of earlier attempts too."""
        return self.earlier_seconds + self.timer.training_seconds

    def to_checkpoint(self) -> Checkpoint:
        """What is to be stored. Collective: every rank must call it.

        Raises:
            Fault: a weight is not finite.
        """
        held = model_state(self.model)
        if (held.keys() & self.finite) - finite_names(held):
            raise Fault(f"a weight is not finite after step {self.step}; no checkpoint has seen it")
        tensors = {"model": held, "optimizer": state_tensors(self.optimizer)}
        transient = transient_buffers(self.model)
        tensors |= {"transient": transient} if transient else {}
        tensors |= self.strategy.state(self.optimizer) | self.average.state() | self.loss_history.state()
        state = {"step": self.step, "train_seconds": self.train_seconds, "best": self.best, **self.attempt}
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        return Checkpoint(tensors, state)

    def restore(self, stored: Checkpoint, is_main: bool) -> None:
        """Takes over what is stored; every rank has read it."""
        load_model_state(self.model, stored.tensors["model"])
        load_transient_buffers(self.model, stored.tensors.get("transient", {}))
        load_state_tensors(self.optimizer, stored.tensors["optimizer"])
        self.strategy.restore(stored.tensors, self.optimizer)
        self.average.restore(stored.tensors, stored.step)
        self.loss_history.restore(stored.tensors, is_main)
        if self.scaler and "scaler" in stored.state:
            self.scaler.load_state_dict(stored.state["scaler"])
        self.step, self.earlier_seconds, self.best = stored.step, stored.state["train_seconds"], stored.state["best"]


def finite_names(tensors: Tensors) -> frozenset[str]:
    """The names of the tensors that have finite values alone."""
    wide = {name: t.float() if t.is_floating_point() and t.itemsize == 1 else t for name, t in tensors.items()}
    return frozenset(name for name, tensor in wide.items() if bool(tensor.isfinite().all()))


def build_state(setup: Setup, accelerator: Accelerator, images: AnySet, heartbeat: Heartbeat) -> TrainingState:
    """The network with all that is trained along with it, on the device, as Accelerate prepares them.

    `images` are the training images on the device. Collective: every rank must call it.
    """
    config = setup.config
    if config.sync.batch_norm and accelerator.num_processes > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(setup.model)  # in place, but for a network that is a single BatchNorm
    model = setup.model.to(accelerator.device).to(memory_format=setup.traits.layout)
    finite = finite_names(model_state(model))
    average = build_average(model, config.optim.ema)
    optimizer = build_optimizer(model, config.optim)
    if config.train.compile != "none":
        model.compile(mode=config.train.compile)  # in place, so the weights keep their names
    loss_history = LossHistory(images) if config.data.focus > 1 else NullLossHistory()
    strategy = build_strategy(
        config, accelerator, model, setup.splits.info, loss_history, heartbeat.phase, setup.traits.one_graph
    )
    prepared = accelerator.prepare_optimizer(optimizer, device_placement=False)
    # Without a scaler the prepared optimizer only passes calls on, for 0.17 ms a step: 2 % with the default network.
    optimizer = prepared if accelerator.scaler else optimizer
    attempt = {"precision": setup.plan.precision, "world_size": accelerator.num_processes, "config": as_dict(config)}
    attempt["data_sha256"] = setup.splits.sha256
    timer = heartbeat.timer
    return TrainingState(model, optimizer, average, strategy, loss_history, accelerator.scaler, timer, attempt, finite)
