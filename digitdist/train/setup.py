"""Everything that a training needs before its process group exists."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import digitdist
from digitdist.checkpoint import weights_sha256
from digitdist.config import Config, as_dict, nearest_folder, read_config
from digitdist.data import Order, Splits, known_info, load_splits
from digitdist.distributed import Plan, make_plan
from digitdist.errors import UserError
from digitdist.model_checks import Parts, Traits, first_images, inspect_model
from digitdist.model_parts import check_scalable, has_batch_norm
from digitdist.model_state import model_state, transient_buffers
from digitdist.models import build_model
from digitdist.runs import has_wandb_key, wandb_mistakes
from digitdist.train.cadence import Cadence
from digitdist.world import is_main

LOCAL_KEYS = ("data.root", "run.dir")  # may differ from host to host


@dataclass(frozen=True)
class Setup:
    """The configuration, what it runs on, the data set and the network of a training."""

    config: Config
    plan: Plan
    splits: Splits
    model: nn.Module
    traits: Traits = Traits()

    @cached_property
    def order(self) -> Order:
        return Order.of_config(self.config, len(self.splits.train))

    @cached_property
    def last_step(self) -> int:
        """The step after which the training ends."""
        return self.order.last_step(self.config.train.epochs, self.config.train.max_steps)

    @cached_property
    def cadence(self) -> Cadence:
        return Cadence.of_config(self.config, self.order, self.last_step)

    def ending(self, step: int, best: dict[str, Any] | None) -> str | None:
        """The key by which the training ends after `step`, None where it goes on; `best` is a `TrainingState`'s."""
        if step >= self.last_step:
            whole = self.last_step == self.order.total_steps(self.config.train.epochs)
            return "train.epochs" if whole else "train.max_steps"
        return "train.patience" if self.cadence.is_out_of_patience(step, best) else None

    @property
    def starts_equal(self) -> bool:
        """Whether ranks must build equal networks; in ddp mode they may take rank 0's, without comparisons."""
        return self.config.sync.mode != "ddp" or bool(self.config.sync.check_every)

    @property
    def notes(self) -> list[str]:
        """Lines to print about what is done otherwise than one may expect."""
        config, notes = self.config, []
        if self.traits.layout_problem:
            notes.append(f"layout     contiguous, since the model does not take channels-last: {self.traits.layout_problem}")
        if self.traits.counting:
            notes.append(
                f"attributes {', '.join(self.traits.counting)} of the model: changed by each forward pass, and no buffer. If a"
                " pass reads that, results depend on restarts and world size; keep it in a buffer (register_buffer)"
            )
        several_ranks = config.sync.mode == "ddp" and self.plan.world.size > 1
        if several_ranks and has_batch_norm(self.model) and not config.sync.batch_norm:
            notes.append(
                "BatchNorm  takes the statistics of each rank's share here, so the result depends on the world size; with"
                " sync.mode=exact it does not, nor, on GPUs, with sync.batch_norm=true"
            )
        return notes

    def fingerprint(self) -> dict[str, str]:
        """What must be the same on every rank: configuration but for a host's folders, code, device, data and network."""
        state = model_state(self.model)
        weights = weights_sha256(state | transient_buffers(self.model))[:12] if self.starts_equal else "any"
        return {name: str(value) for name, value in as_dict(self.config).items() if name not in LOCAL_KEYS} | {
            "digitdist": f"version {digitdist.__version__} with sources {code_sha256()[:12]}",
            "torch": f"version {torch.__version__}",
            "device": self.plan.device_type,
            "effective train.precision": self.plan.precision,
            "data": f"{self.splits.info.name} of SHA-256 {self.splits.sha256[:12]}",
            "model": ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()),
            "the initial state of the model (a function of seed alone)": f"of SHA-256 {weights}",
        }


def code_sha256() -> str:
    """SHA-256 over the package's Python files, those of its subpackages too, in the order of their names."""
    root = Path(digitdist.__file__).parent
    files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    return hashlib.sha256(b"".join(name.encode() + (root / name).read_bytes() for name in files)).hexdigest()


def prepare(files: Sequence[str], overrides: Sequence[str]) -> Setup:
    """Reads the configuration and builds what it names.

    Raises:
        UserError: with every mistake of configuration, launch and network, before anything is made; then that of the data;
            then what is found when the network is tried on them.
    """
    config, mistakes = read_config(files, overrides)
    plan = model = None
    try:
        plan = make_plan(config)
    except UserError as error:
        mistakes += error.mistakes
    info = known_info(config.data)
    try:
        model = build_model(config.model, config.seed, info) if info else None
    except UserError as error:
        mistakes += error.mistakes
    if config.tracking.wandb == "online" and not has_wandb_key():
        mistakes.append("tracking.wandb=online needs a key: run wandb login, or set tracking.wandb=offline")
    if is_main():
        mistakes += wandb_mistakes(config.tracking)
    if is_main() and not os.access(nearest_folder(Path(config.run.dir)), os.W_OK | os.X_OK):
        mistakes.append(f"run.dir={config.run.dir}: no permission to write there; give a folder that you own")
    if mistakes or plan is None:
        raise UserError(*mistakes)
    splits = load_splits(config.data, config.seed)
    setup = Setup(config, plan, splits, model or build_model(config.model, config.seed, splits.info))
    return dataclasses.replace(setup, traits=try_model(setup))


def counts_of_steps(order: Order, last_step: int) -> set[int]:
    """The numbers of images in global batches: all of an epoch have the same but for its last, if that is reached."""
    return {order.batch_count(step) for step in (0, min(last_step, order.steps_per_epoch) - 1)}


def parts_of(setup: Setup, num_micro_batches: int) -> Parts:
    """How many images the network gets at once."""
    config, order = setup.config, setup.order

    def smallest(batch_size: int) -> int:
        other = dataclasses.replace(order, batch_size=batch_size)
        last_step = other.last_step(config.train.epochs, config.train.max_steps)
        return min(max(1, count // num_micro_batches) for count in counts_of_steps(other, last_step))

    def advice(needed: int) -> str:
        near = sorted(range(1, order.num_images + 1), key=lambda size: abs(size - order.batch_size))
        size = next((size for size in near if smallest(size) >= needed), None)
        number = "sync.shards" if config.sync.mode == "exact" else "number of processes"
        return f"set {f'data.batch_size={size}, or ' if size else ''}a smaller train.accumulate or {number}"

    least = min(counts_of_steps(order, setup.last_step))
    chunk = -(-config.data.eval_batch_size // config.sync.shards)
    sizes = [len(images) for images in (setup.splits.validation, setup.splits.test) if len(images)]
    return Parts(
        smallest=smallest(order.batch_size),
        largest=order.batch_count(0),
        evaluated=min(min(size, size % chunk or chunk) for size in sizes),
        where=f"of {order.num_images:,} images in batches of {order.batch_size:,}, one has {least:,} for"
        f" {num_micro_batches} parts",
        advice=advice,
    )


def try_model(setup: Setup) -> Traits:
    """Tries the network on the first training images.

    Raises:
        UserError: it cannot be trained as configured.
    """
    config, order = setup.config, setup.order
    exact = config.sync.mode == "exact"
    num_micro_batches = config.train.accumulate * (config.sync.shards if exact else setup.plan.world.size)
    least = min(counts_of_steps(order, setup.last_step))
    if config.sync.batch_norm and least < num_micro_batches:
        raise UserError(
            f"sync.batch_norm=true needs an image for each of {num_micro_batches} micro-batches a step, and a step here has"
            f" {least}; choose a data.batch_size that divides {order.num_images}, or set sync.batch_norm=false"
        )
    if setup.plan.precision == "fp16":
        check_scalable(setup.model, config.optim.clip_norm)
    traits = inspect_model(
        partial(build_model, config.model, config.seed, setup.splits.info),
        partial(first_images, setup.splits.train, setup.splits.info),
        parts_of(setup, num_micro_batches),
        bf16=setup.plan.device_type == "cpu" and setup.plan.precision == "bf16",
        mode=config.sync.mode,
        repeatable=exact or (setup.plan.world.size > 1 and setup.starts_equal),
    )
    if setup.plan.device_type == "mps" and has_batch_norm(setup.model):
        return dataclasses.replace(
            traits, layout_problem="torch computes wrong gradients of BatchNorm so on MPS, pytorch#175189"
        )
    return traits
