"""Run on every rank of a world by test_fp16.py: trains each case on few images, and prints as JSON what each step came to.

A case has options, the steps that overflow (see fp16_on_cpu.py), and its attempts: the last step of each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from digitdist.checkpoint import weights_sha256
from digitdist.config import load_config
from digitdist.data import Batch, Splits, load_splits
from digitdist.distributed import Heartbeat, run_command, run_on_main, start_accelerator, use_deterministic_algorithms
from digitdist.optim import state_tensors
from digitdist.runs import open_run
from digitdist.sync import StepStats
from digitdist.train import Trainer, prepare
from helpers.runs import events, result

OPTIONS = (
    *("tracking.wandb=disabled", "run.report=false", "train.log_every=1", "train.threads=1", "sync.shards=4"),
    *("model.target=helpers.networks.Light", "data.batch_size=24", "train.epochs=1000"),
    *("train.eval_every=0", "sync.check_every=1"),
)


@functools.cache
def few_images(root: str) -> Splits:
    splits = load_splits(load_config((), [f"data.root={root}"]).data, 0)
    train, test = splits.train.subset(torch.arange(120)), splits.test.subset(torch.arange(40))
    return dataclasses.replace(splits, train=train, test=test)


class Watched(Trainer):
    """Notes what each step comes to on this rank, beside the code that trains."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.steps: list[dict[str, Any]] = []
        self.layers: set[str] = set()  # the dtypes of their outputs
        self.loss = 0.0
        self.expected_average = [p.detach().clone() for p in self.average.eval_model.parameters()]
        self.state.loss_history.record = self._record  # type: ignore[method-assign]
        for module in self.state.model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda _module, _images, output: self.layers.add(str(output.dtype)))

    def _record(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        self.loss += F.cross_entropy(logits.detach().double(), labels, reduction="sum").item()

    def _update(self) -> None:
        self.before = [p.detach().clone() for p in self.state.model.parameters()]  # in local mode not as they were evaluated
        super()._update()

    def train_step(self, batch: Batch) -> StepStats | None:
        model, count = self.state.model, self.order.batch_count(self.step)
        self.loss = 0.0
        stats = super().train_step(batch)
        optimizer = state_tensors(self.state.optimizer)
        moved = [now.detach() - then for now, then in zip(model.parameters(), self.before, strict=True)]
        self.steps.append(
            {
                "loss": self.loss,  # the sum over this rank's images, in float64
                "count": count,  # of images of all ranks
                "weights": weights_sha256(dict(model.named_parameters())),
                "moved": float(torch.cat([m.flatten() for m in moved]).norm()),
                "optimizer": weights_sha256(optimizer),
                "finite": all(bool(t.isfinite().all()) for t in (*model.parameters(), *optimizer.values())),
                "average_off": self._average_off(),
                "scale": self.state.scaler.get_scale() if self.state.scaler else None,
            }
        )
        return stats

    def _average_off(self) -> float:
        """How far the moving average is from one that takes in the weights after every step, skipped or not."""
        weight = 1 - self.config.optim.ema if self.step > 1 else 1.0
        off = []
        networks = self.state.model.parameters(), self.average.eval_model.parameters()
        for expected, p, averaged in zip(self.expected_average, *networks, strict=True):
            expected.lerp_(p.detach(), weight)
            off.append(float((expected - averaged.detach()).abs().max()))
        return max(off)


def train(options: list[str], last: int) -> tuple[Watched, Path]:
    """One attempt of a run, up to step `last`, with an `Accelerator` of its own. Collective."""
    setup = prepare([], [*options, f"train.max_steps={last}"])
    AcceleratorState._reset_state()
    use_deterministic_algorithms(False)
    accelerator = start_accelerator(setup.config, setup.plan)
    run = run_on_main(accelerator, lambda: open_run(setup.config, setup.plan, setup.splits, setup.ending, []))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Watched(setup, accelerator, run, Heartbeat(run.heartbeat, setup.plan.world))
        trainer.train()
    accelerator.wait_for_everyone()
    run.close()
    return trainer, run.folder


def outcome(name: str, options: list[str], overflow: str, attempts: list[int], root: str, runs: str) -> dict[str, Any]:
    """What a case came to: of each rank a list of steps, the lines of the log, the result. Collective."""
    os.environ["FP16_OVERFLOW"] = overflow
    own = [f"data.root={root}", f"run.dir={runs}", f"run.name={name}"]
    steps: list[dict[str, Any]] = []
    layers: set[str] = set()
    for last in attempts:
        trainer, folder = train([*OPTIONS, *own, *options], last)
        steps, layers = steps + trainer.steps, layers | trainer.layers
    return {
        "ranks": gather_object([steps]),
        "layers": sorted(set().union(*gather_object([layers]))),
        "lines": {line["step"]: line for line in events(folder) if "train/loss" in line},
        "result": result(folder),
    }


def main() -> None:
    root, runs, cases = sys.argv[1:]
    pytest.MonkeyPatch().setattr("digitdist.train.setup.load_splits", lambda *_: few_images(root))
    found = {name: outcome(name, *case, root, runs) for name, case in json.loads(cases).items()}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    run_command(main)
