"""The runs of an evaluation, one or several, each computed as it is by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from digitdist.checkpoint import Checkpoint
from digitdist.config import Config, SyncConfig
from digitdist.data import AnySet
from digitdist.distributed import Plan, make_plan, planned_device, start_accelerator
from digitdist.evaluate.evaluating import Scores, chunked_loader, score
from digitdist.model_checks import FEW_IMAGES, Traits, first_images, layout_problem
from digitdist.models import build_model
from digitdist.runs import StoredRun, read_metrics
from digitdist.world import read_world

HELD_OUT = "validation/accuracy"  # among a run's metrics


@dataclass(frozen=True)
class Member:
    """A run, one of its checkpoints, and the network with its weights; `settings` and `plan` say how that is computed."""

    run: StoredRun
    stored: Checkpoint
    model: nn.Module
    settings: Config
    plan: Plan

    def held_out_accuracy(self) -> float | None:
        """The accuracy that the training has logged at this step of the images that it held out; None where there are none."""
        events = read_metrics(self.run.folder, lambda _: None)
        found = [event.get(HELD_OUT) for event in events if event["step"] == self.stored.step]
        return next((accuracy for accuracy in reversed(found) if accuracy is not None), None)

    def layout(self, images: AnySet) -> torch.memory_format:
        """The memory format that the network takes, tried on a few of the images, on the CPU."""
        build = partial(build_model, self.run.config.model, self.run.config.seed, self.run.info)
        return Traits(layout_problem(build, *first_images(images, self.run.info, FEW_IMAGES))).layout

    def score(self, accelerator: Accelerator, images: AnySet, layout: torch.memory_format) -> Scores:
        """What the network makes of all `images`, those in memory on the device. Collective: every rank must call it."""
        model = self.model.to(accelerator.device).to(memory_format=layout)
        loader = chunked_loader(accelerator, images, self.run.config)
        return score(accelerator, model, loader, self.run.info, self.plan.precision)


def open_member(run: StoredRun, which: str, chosen: bool) -> Member:
    """Checkpoint `which` of `run`, to be computed in the precision of its training, or, where one was `chosen`, in that of its
    configuration.

    Raises:
        UserError: there is no such checkpoint, this launch cannot compute it, or its network cannot be built.
    """
    stored = run.checkpoint(which)
    settings = evaluation_config(run.config, None if chosen else run.precision(stored, planned_device()))
    plan = make_plan(settings)
    return Member(run, stored, run.model(stored), settings, plan)


def evaluation_config(config: Config, precision: str | None) -> Config:
    """What of a run's configuration says how to compute, without what only its training needs of a machine; `precision`: the
    one to compute in, None for that of `config`."""
    train = dataclasses.replace(config.train, compile="none", accumulate=1)
    if precision:
        train.precision = precision  # type: ignore[assignment]
    sync = SyncConfig(mode=config.sync.mode, shards=max(config.sync.shards, read_world().size), timeout_s=config.sync.timeout_s)
    return dataclasses.replace(config, train=train, sync=sync)


def start_for(members: Sequence[Member]) -> Accelerator:
    """The `Accelerator` for all `members`, as the first in ``exact`` mode needs it, else as the first does: that mode takes
    deterministic kernels and one thread. Collective: every rank must call it."""
    chosen = next((member for member in members if member.settings.sync.mode == "exact"), members[0])
    return start_accelerator(chosen.settings, chosen.plan)
