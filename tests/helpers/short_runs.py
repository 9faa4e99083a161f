"""Runs of a few steps on a few images, in this process, on however many ranks it is one of."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from digitdist.config import load_config
from digitdist.data import Splits, load_splits
from digitdist.distributed import Heartbeat, StopRequest, run_on_main, use_deterministic_algorithms
from digitdist.errors import Stopped
from digitdist.runs import open_run
from digitdist.train import Trainer, prepare
from digitdist.train.resuming import fitting

QUICK = ("tracking.wandb=disabled", "run.report=false", "train.threads=1", "model.target=helpers.short_runs.Small")


class Small(torch.nn.Module):
    """A convolution, BatchNorm and dropout on images made smaller."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(1, width, 4, 4), torch.nn.BatchNorm2d(width)
        self.head = torch.nn.Linear(width * 49, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(images)).relu().flatten(1)
        return self.head(torch.nn.functional.dropout(x, 0.2, self.training))


@functools.cache
def few_images(root: str, count: int, validation: int) -> Splits:
    """The first `count` images of MNIST to train on, the next `validation` to choose, and 40 to test on."""
    splits = load_splits(load_config((), [f"data.root={root}"]).data, 0)
    held_out = splits.train.subset(torch.arange(count, count + validation))
    test = splits.test.subset(torch.arange(40))
    return dataclasses.replace(splits, train=splits.train.subset(torch.arange(count)), validation=held_out, test=test)


class StopAt(StopRequest):
    """Asks to stop at a step, and not before."""

    def __init__(self, trainer: Trainer, step: int):
        super().__init__()
        self.trainer, self.at, self.report = trainer, step, lambda _: None

    def is_requested(self, stop_file: Path) -> bool:
        return self.trainer.step + 1 >= self.at


def train(
    accelerator: Accelerator, root: str, options: Sequence[str], count: int = 61, stop: int = 0, kill: int = 0
) -> tuple[Path, list[str]]:
    """Trains as `options` say, on `count` images; asked to stop in step `stop`, or gone before step `kill`.

    Returns the run's folder, and the lines about what starts fresh. Collective.
    """
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("digitdist.train.setup.load_splits", lambda data, _: few_images(root, count, data.validation))
        setup = prepare([], [*QUICK, f"data.root={root}", *options])
        use_deterministic_algorithms(setup.config.sync.mode == "exact")

        def fit(stored):
            kept, more = fitting(setup, stored)
            lines.extend(more)
            return kept, more

        run = run_on_main(accelerator, lambda: open_run(setup.config, setup.plan, setup.splits, setup.ending, [], fit))
        try:
            if not (run.finished and run.stored):
                trainer = Trainer(setup, accelerator, run, Heartbeat(run.heartbeat, setup.plan.world))
                if stop:
                    trainer.stop_request = StopAt(trainer, stop)
                if kill:
                    patch.setattr(trainer, "train_step", _until(trainer, kill))
                with contextlib.suppress(Stopped, Killed):
                    trainer.train()
        finally:
            run.close()
    return run.folder, lines


class Killed(Exception):
    """Stands in for a kill of all ranks at once."""


def _until(trainer: Trainer, step: int):
    step_as_it_is = trainer.train_step

    def take(batch):
        if trainer.step + 1 >= step:
            raise Killed
        return step_as_it_is(batch)

    return take
