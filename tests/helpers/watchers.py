"""What the tests of GPUs look at inside a training. Each takes a patch, and returns what it finds while `train` runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import digitdist.train.command
from digitdist.checkpoint import Tensors
from digitdist.data import Batch, Sharding
from digitdist.evaluate import save_predictions
from digitdist.optim import state_tensors
from digitdist.sync.exact import Exact
from digitdist.sync.tree import Reduced, Tree, finish
from digitdist.train import Trainer

Found = dict[str, Any]
OVERFLOWS = (1, 5)  # steps in which `overflow` makes the gradient infinite
WORLDS = (2, 3)  # sizes of the worlds that `offsets` makes one rank stand for


def nothing(patch: pytest.MonkeyPatch) -> Found:
    return {}


def deterministic(patch: pytest.MonkeyPatch) -> Found:
    """Has the other modes too choose kernels that give the same bits each time, as exact mode does."""
    start = digitdist.train.command.start_accelerator

    def start_accelerator(*arguments: Any) -> Accelerator:
        accelerator = start(*arguments)
        torch.use_deterministic_algorithms(True)
        return accelerator

    patch.setattr(digitdist.train.command, "start_accelerator", start_accelerator)
    return {}


def quiet_steps(patch: pytest.MonkeyPatch) -> Found:
    """Has torch raise where the host waits for the device, in steps in which nothing is due and until the next one begins; not
    in the first one, in which libraries set themselves up. ``quiet``: how many there were."""
    found, original = {"quiet": 0}, Trainer.train_step

    def train_step(trainer: Trainer, batch: Batch) -> Any:
        step, sync = trainer.step + 1, trainer.config.sync
        due = dataclasses.astuple(trainer.cadence.between(trainer.synced_step, step))
        ends_round = sync.mode != "local" or step % sync.every == 0  # until which a line of the log waits
        quiet = step > 1 and not (ends_round and any(due)) and not trainer.cadence.needs_equal_weights(step)
        found["quiet"] += quiet
        if trainer.accelerator.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        return original(trainer, batch)

    patch.setattr(Trainer, "train_step", train_step)
    return found


def looks(patch: pytest.MonkeyPatch) -> Found:
    """Where things are, how they lie in memory, and in what the network computes."""
    found, original = Found(), Trainer.train

    def train(trainer: Trainer) -> None:
        state, wrapped = trainer.state, getattr(trainer.strategy, "module", None)
        convolution = [module for module in state.model.modules() if isinstance(module, nn.Conv2d)][-1]
        hook = convolution.register_forward_hook(lambda _, inputs, output: found.update(dtype=str(output.dtype)))
        found["weights on"] = str(convolution.weight.device)
        found["images on"] = str(trainer.splits.train.indices.device)
        found["order on"] = trainer.sampler.device.type
        found["channels-last"] = convolution.weight.is_contiguous(memory_format=torch.channels_last)
        found["fused"] = all(group["fused"] for group in state.optimizer.param_groups)
        found["float32"] = torch.get_float32_matmul_precision()
        found["views"] = isinstance(wrapped, DistributedDataParallel) and wrapped.gradient_as_bucket_view
        original(trainer)
        hook.remove()

    patch.setattr(Trainer, "train", train)
    return found


def contexts(patch: pytest.MonkeyPatch) -> Found:
    """The GPUs on which this process has a context at its end, by their numbers, and its own one."""
    found, original = Found(), Trainer.finish

    def finish_training(trainer: Trainer) -> None:
        original(trainer)
        devices = range(torch.cuda.device_count())
        found["contexts"] = [device for device in devices if torch._C._cuda_hasPrimaryContext(device)]
        found["own"] = trainer.accelerator.device.index

    patch.setattr(Trainer, "finish", finish_training)
    return found


def uncompiled(patch: pytest.MonkeyPatch) -> Found:
    """Evaluates at the end once more, without what `torch.compile` has made, into ``uncompiled.npz`` of the run's folder."""
    original = Trainer.finish

    def finish_training(trainer: Trainer) -> None:
        original(trainer)
        for network in trainer.average.networks:
            network._compiled_call_impl = None
        save_predictions(trainer._evaluate("test"), trainer.run.folder / "uncompiled.npz")

    patch.setattr(Trainer, "finish", finish_training)
    return {}


def overflow(patch: pytest.MonkeyPatch) -> Found:
    """Multiplies the loss by infinity in `OVERFLOWS`, if it is scaled. ``steps``: what each step has changed.

    ``momentum error``: by how much the first moment differs from that of the gradients so far, but for skipped ones.
    """
    found: Found = {"steps": []}
    original = Trainer.train_step

    def train_step(trainer: Trainer, batch: Batch) -> Any:
        state, step = trainer.state, trainer.step + 1
        forced = state.scaler is not None and step in OVERFLOWS
        before = _state(trainer), _scale(trainer), _moments(state.optimizer)
        with pytest.MonkeyPatch.context() as inner:
            backward, update, gradients = trainer.accelerator.backward, state.optimizer.step, list[Tensor]()
            inner.setattr(trainer.accelerator, "backward", lambda loss: backward(loss * math.inf if forced else loss))

            def step_taken() -> None:
                unscaled = 1.0 if trainer.config.optim.clip_norm else before[1]  # clipping has divided by the scale
                gradients.extend(p.grad / unscaled for p in trainer.strategy.parameters)
                update()

            inner.setattr(state.optimizer, "step", step_taken)
            stats = original(trainer, batch)
        after = _state(trainer), _scale(trainer), _moments(state.optimizer)
        found["steps"].append(
            {
                "step": step,
                "forced": forced,
                "scale": [before[1], after[1]],
                "weights changed": _differ(before[0][0], after[0][0]),
                "optimizer changed": _differ(before[0][1], after[0][1]),
                "finite": all(bool(p.isfinite().all()) for p in trainer.strategy.parameters),
                "momentum error": _momentum_error(trainer, before[2], after[2], gradients),
            }
        )
        return stats

    patch.setattr(Trainer, "train_step", train_step)
    return found


def _state(trainer: Trainer) -> tuple[Tensors, Tensors]:
    """Copies of the weights and of the optimizer's state."""
    weights, optimizer = dict(trainer.state.model.named_parameters()), state_tensors(trainer.state.optimizer)
    copies = ({name: value.detach().clone() for name, value in tensors.items()} for tensors in (weights, optimizer))
    return tuple(copies)  # type: ignore[return-value]


def _differ(before: Tensors, after: Tensors) -> bool:
    """Whether a number has changed; what an optimizer has just made was zeros."""
    return any(not torch.equal(before.get(name, torch.zeros_like(value)), value) for name, value in after.items())


def _scale(trainer: Trainer) -> float:
    return trainer.state.scaler.get_scale() if trainer.state.scaler else 1.0


def _moments(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """A copy of the first moment of each parameter that has one, by its number."""
    state, names = optimizer.state_dict()["state"], ("momentum_buffer", "exp_avg")
    return {number: values[name].clone() for number, values in state.items() for name in names if name in values}


def _momentum_error(trainer: Trainer, before: dict[int, Tensor], after: dict[int, Tensor], gradients: list[Tensor]) -> float:
    """The largest difference of a first moment from what it was and a finite gradient make of it."""
    config, largest = trainer.config.optim, 0.0
    keeps, takes = (config.momentum, 1.0) if config.name == "sgd" else (config.beta1, 1 - config.beta1)
    for number, gradient in enumerate(gradients):
        if bool(gradient.isfinite().all()):
            expected = takes * gradient + keeps * before.get(number, torch.zeros_like(gradient))
            largest = max(largest, float((after[number] - expected).abs().max()))
    return largest


def offsets(patch: pytest.MonkeyPatch) -> Found:
    """Computes each fourth step's gradient also as the ranks of larger worlds would, one rank after another, whose shares begin
    at other images. ``compared``: step and world size of each; ``different``: those that differ in a bit."""
    found: Found = {"compared": [], "different": []}
    original = Exact.compute_gradients

    def compute_gradients(strategy: Exact, batch: Batch, count: int, step: int, stop: bool) -> Tensor:
        if step % 4 == 0:
            alone = _as_ranks_would(original, strategy, batch, count, step, 1)
            for world_size in WORLDS:
                found["compared"].append([step, world_size])
                shared = _as_ranks_would(original, strategy, batch, count, step, world_size)
                if not torch.equal(alone.view(torch.uint8), shared.view(torch.uint8)):  # NaN, too, is itself
                    found["different"].append([step, world_size])
        return original(strategy, batch, count, step, stop)

    patch.setattr(Exact, "compute_gradients", compute_gradients)
    return found


def _as_ranks_would(
    compute: Callable[..., Tensor], strategy: Exact, batch: Batch, count: int, step: int, world_size: int
) -> Tensor:
    """The root of the tree and the statistics of all shards of a global batch that `world_size` ranks share."""
    nodes, values, all_rows = [], [], list[Tensor]()
    buffers = [buffer.clone() for buffer in strategy.loss.model.buffers()]

    def reduce(tree: Tree, rows: list[Tensor], stop: Tensor, num_shards: int) -> Reduced:
        nodes.append([(start, size) for start, size, _ in tree.nodes])
        values.append([value for _, _, value in tree.nodes])
        all_rows.extend(rows)
        return Reduced(stop.new_zeros(strategy.reduction.length), [], stop[0])

    for sharding in Sharding.of_all_ranks(world_size, strategy.sharding.num_micro_batches):
        first, end = sharding.share(count)
        share = Batch(*(tensor[first:end].clone() for tensor in batch))  # a rank's own memory
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(strategy, "sharding", sharding)
            patch.setattr(strategy.reduction, "reduce", reduce)
            compute(strategy, share, count, step, False)
    for buffer, value in zip(strategy.loss.model.buffers(), buffers, strict=True):
        buffer.copy_(value)
    root = finish(nodes, values)  # type: ignore[arg-type]
    return torch.cat([root, *(row.to(root.device) for row in all_rows)])  # rows without numbers are on the CPU


WATCHERS: dict[str, Callable[[pytest.MonkeyPatch], Found]] = {
    watcher.__name__: watcher
    for watcher in (nothing, deterministic, quiet_steps, looks, contexts, uncompiled, overflow, offsets)
}
