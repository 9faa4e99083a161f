"""The recipes: a study of each, one run at a time with all cores, and what the whole command takes."""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from digitdist.distributed import StopRequest
from digitdist.errors import Fault
from digitdist.report import read_study
from digitdist.study import Progress, Slot, plan_study, study_table, train_all

RECIPES = ("fast", "sharp")


def measure_recipes(num_seeds: int, overrides: list[str]) -> None:
    """Trains each of `RECIPES` with seeds 0 to num_seeds-1, and prints accuracy and seconds.

    Raises:
        UserError: a mistake in `overrides`.
        Fault: a training has failed; the message says why.
    """
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / recipe
            trainings = plan_study(folder, num_seeds, [recipe], [*overrides, "tracking.wandb=disabled"])
            alone = [Slot({}, None)]
            outcome = train_all(trainings, alone, Progress(recipe, num_seeds, 0, sys.stderr), StopRequest())
            for run, reason in outcome.failures.items():
                raise Fault(f"{run} failed: {reason}")
            seconds = statistics.mean(outcome.seconds.values())
            print(f"{study_table([read_study(folder)])}\nthe whole command {seconds:.1f} s", flush=True)
