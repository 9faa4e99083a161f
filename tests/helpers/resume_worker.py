"""Run on every rank of a world by test_resuming.py: short runs that are stopped, killed and resumed, and the unbroken ones.

It prints, on the main rank, a JSON object: of each group of runs, the weights, loss, metric lines and end of each. With the
argument ``patient`` they are those of `patient_runs` alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from digitdist.config import load_config
from digitdist.distributed import make_plan, run_command, start_accelerator
from digitdist.errors import Fault
from helpers import short_runs
from helpers.runs import events, result

# 4 steps an epoch, and 4 a round in local mode.
COMMON = (
    *("data.batch_size=20", "optim.ema=0.8", "train.log_every=1", "train.eval_every=2", "train.epochs=9"),
    *("sync.every=4", "checkpoint.every_steps=0", "data.validation=10", "data.focus=2", "sync.check_every=1"),
)
LAST = "train.max_steps=21"
# All keys that a resumed run may change, each with another value; those that `NOT_TRIED` names have none to try.
CHANGED = {
    "data.workers": 2,
    "data.eval_batch_size": 7,
    "train.epochs": 8,
    "train.max_steps": 21,
    "train.log_every": 5,
    "train.profile": 3,
    "train.eval_every": 1,
    "sync.check_every": 3,
    "sync.join_timeout_s": 100,
    "sync.timeout_s": 100,
    "checkpoint.every_steps": 3,
    "checkpoint.keep": 1,
    "checkpoint.allow_change": "true",
    "tracking.project": "other",
    "tracking.entity": "somebody",
    "tracking.group": "some",
    "tracking.tags": "[a]",
    "tracking.name": "named",
    "tracking.notes": "text",
    "tracking.artifacts": "true",
}
NOT_TRIED = {
    "data.root": "the same images elsewhere",
    "train.patience": "where a run ends, which `patient_runs` try",
    "sync.batch_norm": "not allowed in the modes in which it is harmless",
    "train.threads": "rounding follows it, which only exact mode promises",
    "checkpoint.resume": "which checkpoint it is",
    "run.dir": "where the run is",
    "run.name": "which run it is",
    "run.report": "made when the training has ended",
    "tracking.wandb": "W&B has tests of its own",
}


class World:
    """The ranks of this launch."""

    def __init__(self, accelerator: Accelerator, root: str, folder: str):
        self.accelerator, self.root, self.folder = accelerator, root, Path(folder) / f"runs-{accelerator.num_processes}"

    def train(self, name: str, *options: str, **how: int) -> Path:
        """A run, or a part of one. Collective."""
        own = (f"run.dir={self.folder}", f"run.name={name}", *options)
        folder, lines = short_runs.train(self.accelerator, self.root, own, **how)
        assert not lines
        self.accelerator.wait_for_everyone()
        return folder

    def finished(self, name: str, *options: str) -> dict[str, Any]:
        """What has come of a run. Collective."""
        folder = self.train(name, *options)
        if not self.accelerator.is_main_process:
            return {}
        final = result(folder)
        return {
            "weights": final["weights_sha256"],
            "loss": final["test_loss"],
            "lines": events(folder),
            "ended": final["ended"],
        }

    def broken(self, name: str, options: tuple[str, ...], **how: int) -> dict[str, Any]:
        self.train(name, *options, LAST, **how)
        return self.finished(name, *options, LAST)


def local_runs(world: World, overlap: str) -> dict[str, Any]:
    """Runs that are stopped at and within rounds, or gone between checkpoints that lie within rounds."""
    name, options = f"overlap-{overlap}-", (*COMMON, "sync.mode=local", f"sync.overlap={overlap}")
    saved = (*options, "checkpoint.every_steps=3")
    found = {"unbroken": world.finished(f"{name}unbroken", *options, LAST)}
    found["unbroken, saved"] = world.finished(f"{name}saved", *saved, LAST)
    for step in (6, 8):
        found[f"stopped at {step}"] = world.broken(f"{name}stop-{step}", options, stop=step)
        found[f"stopped at {step}, saved"] = world.broken(f"{name}stop-saved-{step}", saved, stop=step)
    for step in (4, 9, 11):
        found[f"killed at {step}, saved"] = world.broken(f"{name}kill-{step}", saved, kill=step)
    return found


def changed_runs(world: World, mode: str, *more: str) -> dict[str, Any]:
    """A run that ends early and goes on with all harmless keys changed, and the unbroken one."""
    name, options = "-".join((mode, *more)).replace("=", "-"), (*COMMON, f"sync.mode={mode}", *more)
    unbroken = world.finished(f"{name}-unbroken", *options, LAST)
    world.train(f"{name}-changed", *options, "train.max_steps=6")
    changed = (f"{key}={value}" for key, value in CHANGED.items())
    return {"unbroken": unbroken, "changed": world.finished(f"{name}-changed", *options, *changed)}


def patient_runs(world: World, mode: str) -> dict[str, Any]:
    """Runs that end by `train.patience`, unbroken, stopped and gone."""
    options = (*COMMON, f"sync.mode={mode}", "data.focus=1", "train.epochs=20", "train.eval_every=1", "train.patience=1")
    found = {"unbroken": world.finished(f"patient-{mode}", *options)}
    for how, step in (("stop", 3), ("kill", 6), ("stop", 8)):
        world.train(f"patient-{mode}-{how}-{step}", *options, **{how: step})
        found[f"{how} at {step}"] = world.finished(f"patient-{mode}-{how}-{step}", *options)
    return found


def fault_of(world: World, *options: str) -> str:
    """What ends a run whose ranks come to differ. Collective."""
    try:
        world.train("differs", *options)
    except Fault as fault:
        return str(fault)
    finally:
        world.accelerator.wait_for_everyone()
        shutil.rmtree(world.folder / "differs", ignore_errors=True)
    return "none"


def main() -> None:
    root, folder, *only = sys.argv[1:]
    accelerator = start_accelerator(config := load_config((), [f"data.root={root}", "train.threads=1"]), make_plan(config))
    world = World(accelerator, root, folder)
    found = {mode: patient_runs(world, mode) for mode in ("ddp", "exact", "local")} if only else all_runs(world)
    if accelerator.is_main_process:
        print(json.dumps(found))
    accelerator.end_training()


def all_runs(world: World) -> dict[str, Any]:
    """All groups of runs but those with patience."""
    found: dict[str, Any] = {f"overlap {overlap}": local_runs(world, overlap) for overlap in ("false", "true")}
    running_mean = "model.target=helpers.awkward.RunningMean"
    for mode, *more in (("ddp",), ("ddp", running_mean), ("exact",), ("local",), ("local", "sync.overlap=true", running_mean)):
        found[" ".join((mode, *more))] = changed_runs(world, mode, *more)
    differs = (*COMMON, "sync.check_every=0", "model.target=helpers.awkward.ChangedParameter", "train.eval_every=0")
    found["differs"] = {
        "in its middle": fault_of(world, *differs, "checkpoint.every_steps=3", "train.max_steps=9"),
        "at its end": fault_of(world, *differs, "train.max_steps=5"),
    }
    return found


if __name__ == "__main__":
    run_command(main)
