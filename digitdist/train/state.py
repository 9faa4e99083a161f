"""What is trained, and what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
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

LEAST_SCALE = 2.0**-14  # of fp16's loss: only a gradient above 1e9 overflows with it, and 30 overflows in a row lead below it


@dataclass
class TrainingState:
    """Everything that the rest of a training depends on, and its position: `step` updates have been made.

    `best` is the step and accuracy of the best evaluation on held-out images, and at which step the last one was
    (``evaluated``); `attempt` is stored with each checkpoint.
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

    def check_scale(self) -> None:
        """Ends all ranks together where the gradients of fp16 overflow however small the loss is scaled: each step would be
        skipped, to the end of the run. Collective: every rank must call it.

        Raises:
            Fault: naming the ranks.
        """
        scales = gather_object([self.scaler.get_scale()]) if self.scaler else []
        ranks = [str(rank) for rank, scale in enumerate(scales) if scale < LEAST_SCALE]
        if ranks:
            raise Fault(
                f"step {self.step}: gradients are not finite in fp16, on rank {', '.join(ranks)}, though the loss is scaled by"
                f" no more than {LEAST_SCALE:.0e}; no step is taken any more. Look for a division by 0 or the root of 0 in the"
                " network, or set train.precision=fp32"
            )

    def restore(self, stored: Checkpoint, is_main: bool) -> None:
        """Takes over what is stored, of which `resuming.fitting` has left what fits; every rank has read it."""
        load_model_state(self.model, stored.tensors["model"])
        load_transient_buffers(self.model, stored.tensors.get("transient", {}))
        if "optimizer" in stored.tensors:
            load_state_tensors(self.optimizer, stored.tensors["optimizer"])
        if self.scaler and stored.state.get("scaler"):
            self.scaler.load_state_dict(stored.state["scaler"])
        self.average.restore(stored.tensors, stored.step)
        # After what is the main rank's: in local mode each rank has its own.
        self.strategy.restore(stored.tensors, self.optimizer, self.average.networks)
        self.loss_history.restore(stored.tensors, is_main)
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
    # Without a scaler the prepared optimizer only passes calls on, for 0.17 ms a step: 2 % with the default network. With one,
    # a fused optimizer itself skips a step that overflows, on the device: the host does not wait for that.
    optimizer = prepared if accelerator.scaler else optimizer
    if accelerator.scaler:
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))  # makes the scale: a rank may have no image yet
    attempt = {"precision": setup.plan.precision, "world_size": accelerator.num_processes, "config": as_dict(config)}
    attempt["data_sha256"] = setup.splits.sha256
    timer = heartbeat.timer
    return TrainingState(model, optimizer, average, strategy, loss_history, accelerator.scaler, timer, attempt, finite)
