"""Run on every rank of a world: short runs that are stopped, killed and resumed, and the unbroken ones they must equal.

It prints, on the main rank, a JSON object: of each case what has been found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from digitdist.config import load_config
from digitdist.distributed import make_plan, run_command, start_accelerator
from helpers import short_runs
from helpers.runs import events, result

LOCAL = (
    *("sync.mode=local", "sync.every=4", "data.batch_size=20", "train.max_steps=21", "optim.ema=0.8", "sync.check_every=1"),
    *("train.log_every=1", "train.eval_every=0", "checkpoint.every_steps=0", "train.epochs=9"),
)


class World:
    """The ranks of this launch."""

    def __init__(self, accelerator: Accelerator, root: str, folder: str):
        self.accelerator, self.root, self.folder = accelerator, root, folder

    def train(self, name: str, *options: str, **how: int) -> Path:
        """A run, or a part of one."""
        own = (f"run.dir={self.folder}", f"run.name={name}", *options)
        folder, _ = short_runs.train(self.accelerator, self.root, own, **how)
        self.accelerator.wait_for_everyone()
        return folder

    def found(self, folder: Path) -> dict[str, Any]:
        """The weights, accuracy and loss, and the metric lines of a run."""
        if not self.accelerator.is_main_process:
            return {}
        final = result(folder)
        return {"weights": final["weights_sha256"], "loss": final["test_loss"], "lines": events(folder)}


def breaks(world: World, name: str, *options: str) -> dict[str, Any]:
    """Runs that are stopped, or gone, at each step of three rounds, and the unbroken one."""
    found = {"unbroken": world.found(world.train(f"{name}-unbroken", *LOCAL, *options))}
    for step in range(3, 15):
        for how in ("stop", "kill"):
            every = () if how == "stop" else ("checkpoint.every_steps=3",)
            case = f"{name}-{how}-{step}"
            world.train(case, *LOCAL, *options, *every, **{how: step})
            found[case] = world.found(world.train(case, *LOCAL, *options, *every))
    return found


def main() -> None:
    root, folder = sys.argv[1:]
    accelerator = start_accelerator(config := load_config((), [f"data.root={root}", "train.threads=1"]), make_plan(config))
    world = World(accelerator, root, folder)
    found = {}
    for overlap in ("false", "true"):
        found[f"overlap {overlap}"] = breaks(world, f"overlap-{overlap}", f"sync.overlap={overlap}")
    if accelerator.is_main_process:
        print(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
