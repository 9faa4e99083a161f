"""What each shortcut of `digitdist.distributed.shortcuts` saves: short trainings with and without it, in turn."""

from __future__ import annotations

import statistics

from digitdist.bench.launching import result_of_training
from digitdist.bench.loops import QUIET
from digitdist.bench.one_process import start_up
from digitdist.distributed import SHORTCUTS

STEPS = 300


def measure_shortcuts(overrides: list[str], repeats: int) -> None:
    """Prints, for each shortcut, time without it beside time with it: median, least and greatest of `repeats` turns.

    Measured is the time of training, and for ``compiler`` that of the start.
    """
    for name in SHORTCUTS:
        ratios = [_saved(name, overrides) for _ in range(repeats)]
        what = "seconds to the first step" if name == "compiler" else "seconds of training"
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
    with_it = _train_seconds(overrides, {})
    return _train_seconds(overrides, without) / with_it


def _train_seconds(overrides: list[str], env: dict[str, str]) -> float:
    return result_of_training([*overrides, f"train.max_steps={STEPS}", "train.eval_every=0", *QUIET], env=env)["train_seconds"]
