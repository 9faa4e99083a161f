"""The recipes: accuracy and seconds over seeds, by the trainer's own command."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from digitdist.errors import Fault
from digitdist.runs import RESULT

RECIPES = ("fast", "sharp")


def measure_recipes(num_seeds: int, overrides: list[str]) -> None:
    """Trains each of `RECIPES` with seeds 0 to num_seeds-1, and prints accuracy and seconds.

    Without W&B and without the page of plots, whose seconds are not part of a training.

    Raises:
        Fault: a training has failed; it has said why.
    """
    for recipe in RECIPES:
        runs = [train_recipe(recipe, seed, overrides) for seed in range(num_seeds)]
        accuracies, train_seconds, wall_seconds = zip(*runs, strict=True)
        deviation = 100 * statistics.stdev(accuracies) if num_seeds > 1 else math.nan
        print(
            f"{recipe:6} test accuracy {100 * statistics.mean(accuracies):.3f} %, deviation {deviation:.3f}, {num_seeds} seeds"
            f" ({100 * min(accuracies):.2f} to {100 * max(accuracies):.2f});"
            f" train_seconds {statistics.mean(train_seconds):.2f} ({min(train_seconds):.2f} to {max(train_seconds):.2f});"
            f" the whole command {statistics.mean(wall_seconds):.1f} s",
            flush=True,
        )


def train_recipe(recipe: str, seed: int, overrides: list[str]) -> tuple[float, float, float]:
    """Test accuracy, `train_seconds` and the whole command's seconds of one training, in a run folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"seed={seed}", f"run.dir={folder}", "run.name=recipe", "run.report=false", "tracking.wandb=disabled"]
        command = [sys.executable, "-m", "digitdist.train", "--config", recipe, *overrides, *fixed]
        start = time.perf_counter()
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        seconds = time.perf_counter() - start
        if code:
            raise Fault(f"{' '.join(command)} ended with exit code {code}")
        result = json.loads((Path(folder) / "recipe" / RESULT).read_text())
    return result["test_accuracy"], result["train_seconds"], seconds
