"""What each shortcut of `digitdist.distributed.shortcuts` saves: short trainings with and without it, in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from digitdist.bench.loops import QUIET
from digitdist.bench.one_process import start_up
from digitdist.distributed import SHORTCUTS
from digitdist.runs import RESULT, read_metrics

STEPS = 300


def measure_shortcuts(overrides: list[str], repeats: int) -> None:
    """Prints, for each shortcut, time without it beside time with it: median, least and greatest of `repeats` turns.

    Measured is the time of training, on two processes for ``exchange``; that of the start for ``compiler``; and the longest
    step for ``gc``.
    """
    for name in SHORTCUTS:
        ratios = [_saved(name, overrides) for _ in range(repeats)]
        what = {"compiler": "seconds to the first step", "gc": "longest step"}.get(name, "seconds of training")
        print(
            f"{name:10} {what}: without it {statistics.median(ratios):.2f} times those with it"
            f" ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def _saved(name: str, overrides: list[str]) -> float:
    without = {"DIGITDIST_WITHOUT": name}
    if name == "compiler":
        start = {key: start_up(overrides, env)["command to first step"][0] for key, env in (("with", {}), ("without", without))}
        return start["without"] / start["with"]
    measure = _longest_step if name == "gc" else _train_seconds
    world_size = 2 if name == "exchange" else 1
    with_it = measure(world_size, overrides, {})
    return measure(world_size, overrides, without) / with_it


def _train_seconds(world_size: int, overrides: list[str], env: dict[str, str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        _train(folder, world_size, overrides, env)
        return json.loads((Path(folder) / "a" / RESULT).read_text())["train_seconds"]


def _longest_step(world_size: int, overrides: list[str], env: dict[str, str]) -> float:
    with tempfile.TemporaryDirectory() as folder:
        _train(folder, world_size, [*overrides, "train.log_every=1"], env)
        return max(line["time/total"] for line in read_metrics(Path(folder) / "a")[10:] if "time/total" in line)


def _train(folder: str, world_size: int, overrides: list[str], env: dict[str, str]) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(world_size)] if world_size > 1 else []
    fixed = [f"run.dir={folder}", "run.name=a", f"train.max_steps={STEPS}", "train.eval_every=0", *QUIET]
    command = [sys.executable, *launch, "-m", "digitdist.train", *overrides, *fixed]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | env)
