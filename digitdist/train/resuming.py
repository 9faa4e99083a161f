"""What of a checkpoint fits the training that is to resume it, found out on copies before a file of the run is touched."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from digitdist.checkpoint import Checkpoint
from digitdist.config import as_dict
from digitdist.data import LOSS_HISTORY
from digitdist.distributed import generators_kept
from digitdist.errors import UserError, in_one_line
from digitdist.model_state import load_model_state, load_transient_buffers
from digitdist.models import build_model
from digitdist.optim import build_optimizer, learning_rate, state_tensors
from digitdist.runs import CHANGE_ADVICE
from digitdist.sync import OF_A_RANK
from digitdist.train.setup import Setup


def fitting(setup: Setup, stored: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """`stored` without the parts that do not fit `setup`, and a line to print about each part that starts fresh.

    Parts are the optimizer's state, the moving average, what a strategy keeps, the losses of images, fp16's scale, and the
    best evaluation. Nothing is changed but on copies, and the generators are left as they were.

    Raises:
        UserError: the weights do not fit; or, without `checkpoint.allow_change`, another part does not, or the steps already
            taken would have had another learning rate.
    """
    with generators_kept():
        model = _with_weights(setup, stored)
        drop, lines = _optimizer(setup, stored, model)
        lines += _rates(setup, stored)
    for part in (_average, _images, _scale):
        dropped, more = part(setup, stored)
        drop, lines = drop | dropped, lines + more
    if lines and not setup.config.checkpoint.allow_change:
        raise UserError(*(f"{stored.folder}: {line}; {CHANGE_ADVICE}" for line in lines))
    dropped, more = _strategy(setup, stored, drop)  # which another world size may change
    kept = {name: group for name, group in stored.tensors.items() if name not in drop | dropped}
    state = {name: None if name in drop else value for name, value in stored.state.items()}
    return Checkpoint(kept, state, stored.folder), lines + more


def _with_weights(setup: Setup, stored: Checkpoint) -> nn.Module:
    """A new network with the stored weights."""
    model = build_model(setup.config.model, setup.config.seed, setup.splits.info)
    try:
        load_model_state(model, stored.tensors["model"])
        with torch.no_grad():
            load_transient_buffers(model, stored.tensors.get("transient", {}))
    except Exception as error:  # a user's network may raise anything
        raise UserError(
            f"{stored.folder}: its weights do not fit this network ({in_one_line(error)}); set back model.* and data.*, or give"
            " another run.name"
        ) from error
    return model


def _optimizer(setup: Setup, stored: Checkpoint, model: nn.Module) -> tuple[set[str], list[str]]:
    """Compares the stored state with what a first step of the configured optimizer makes."""
    optimizer = build_optimizer(model, setup.config.optim)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    wanted = {name: tensor.shape for name, tensor in state_tensors(optimizer).items()}
    groups = [name for name in stored.tensors if name == "optimizer" or name.startswith(f"optimizer{OF_A_RANK}")]
    if all({name: t.shape for name, t in stored.tensors[group].items()} == wanted for group in groups):
        return set(), []
    return set(groups), [
        f"the stored state of the optimizer does not fit optim.name={setup.config.optim.name}; it starts fresh"
    ]


def _rates(setup: Setup, stored: Checkpoint) -> list[str]:
    """A line where the number of epochs, which may be raised, changes the learning rate of the steps already taken, as it does
    in a schedule over all steps: the training would be the unbroken one of neither number."""
    config, order, epochs = setup.config, setup.order, stored.state["config"]["train.epochs"]

    def rate(epochs: float, step: int) -> float:
        return learning_rate(step, order.total_steps(epochs), order.steps_per_epoch, config.schedule, config.optim.lr)

    if all(rate(epochs, step) == rate(config.train.epochs, step) for step in range(stored.step)):
        return []
    last, following = rate(epochs, stored.step - 1), rate(config.train.epochs, stored.step)
    return [
        f"train.epochs was {epochs:g} and is now {config.train.epochs:g}, with which schedule.name={config.schedule.name} would"
        f" have given the steps already taken other rates; it goes from {last:.3g} in step {stored.step:,} to {following:.3g}"
    ]


def _average(setup: Setup, stored: Checkpoint) -> tuple[set[str], list[str]]:
    if setup.config.optim.ema and "ema" not in stored.tensors:
        return set(), [f"no moving average is stored; that of optim.ema={setup.config.optim.ema:g} starts from these weights"]
    if not setup.config.optim.ema and "ema" in stored.tensors:
        return {"ema"}, ["the stored moving average is dropped, since optim.ema=0; the weights themselves are evaluated"]
    return set(), []


def _images(setup: Setup, stored: Checkpoint) -> tuple[set[str], list[str]]:
    """What is known of images: their losses, and the best evaluation on those held out."""
    drop, lines, was = set(), [], stored.state["config"]
    others = stored.state.get("data_sha256", setup.splits.sha256) != setup.splits.sha256
    known = len(stored.tensors.get(LOSS_HISTORY, {}).get("known", ()))
    if setup.config.data.focus > 1 and (others or known != int(setup.splits.train.indices.max()) + 1):
        drop.add(LOSS_HISTORY)
        lines.append("no losses of these images are stored; those of data.focus start fresh")
    now = as_dict(setup.config)
    if stored.state.get("best") and (others or _held_out(now | was) != _held_out(now)):
        drop.add("best")
        lines.append("the best evaluation was on other held-out images; it starts fresh")
    return drop, lines


def _held_out(config: dict[str, Any]) -> tuple[int, int]:
    """How many images are held out, and the seed by which they are chosen."""
    own = config["data.validation_seed"]
    return config["data.validation"], config["seed"] if own is None else own


def _scale(setup: Setup, stored: Checkpoint) -> tuple[set[str], list[str]]:
    fp16 = setup.plan.precision == "fp16"
    if fp16 == bool(stored.state.get("scaler")):
        return set(), []
    drop = {"scaler"} | {name for name in stored.tensors if name.startswith(f"scaler{OF_A_RANK}")}
    return drop, ["no loss scale of fp16 is stored; it starts fresh"] if fp16 else []


def _strategy(setup: Setup, stored: Checkpoint, drop: set[str]) -> tuple[set[str], list[str]]:
    """What a strategy keeps of each rank fits the same number of ranks alone; the rest, its mode alone."""
    was, sync = stored.state["config"], setup.config.sync
    of_ranks = {name for name in stored.tensors if OF_A_RANK in name}
    if was["sync.mode"] != sync.mode or was.get("sync.compress", "none") != sync.compress:
        groups = of_ranks | ({"outer", "round"} & stored.tensors.keys())
        return groups, [f"what sync.mode={was['sync.mode']} keeps of its ranks is dropped"] if groups else []
    if of_ranks and stored.state["world_size"] != setup.plan.world.size:
        size = stored.state["world_size"]
        return of_ranks | {"round"}, [f"what {size} ranks had each of its own is dropped on {setup.plan.world.size}"]
    other_average = ("ema" in stored.tensors) != bool(setup.config.optim.ema)
    return (of_ranks | {"round"}, []) if drop & of_ranks or other_average else (set(), [])
