"""The recipes: accuracy and seconds over seeds, by the trainer's own command."""

from __future__ import annotations

import math
import statistics
import time

from digitdist.bench.launching import result_of_training

RECIPES = ("fast", "sharp")


def measure_recipes(num_seeds: int, overrides: list[str]) -> None:
    """Trains each of `RECIPES` with seeds 0 to num_seeds-1, and prints accuracy and seconds.

    Raises:
        Fault: a training has failed; the message says why.
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
    """Test accuracy, `train_seconds` and the whole command's seconds of one training."""
    start = time.perf_counter()
    result = result_of_training(["--config", recipe, *overrides, f"seed={seed}"])
    return result["test_accuracy"], result["train_seconds"], time.perf_counter() - start
