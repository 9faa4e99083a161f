"""Run on every rank of a world by test_worlds.py: gradients, rounds and loss histories are those of the reference."""

from __future__ import annotations

import random
import sys

from digitdist.config import load_config
from digitdist.data import load_splits
from digitdist.distributed import make_plan, run_command, start_accelerator
from helpers.strategies import check_against_reference, check_loss_history, check_rounds


def main() -> None:
    config = load_config((), [f"data.root={sys.argv[1]}", "train.threads=1", "train.accumulate=2"])
    accelerator = start_accelerator(config, make_plan(config))
    splits = load_splits(config.data, 0)
    cases = random.Random(0)
    for case in range(12):
        batch, accumulate = cases.choice([1, 2, 3, 7, 24, 50, 61]), cases.randint(1, 4)
        shards = cases.randint(accelerator.num_processes, 9)
        check_against_reference(accelerator, splits, ("ddp", "exact")[case % 2], batch, accumulate, shards)
    check_rounds(accelerator, splits)
    check_loss_history(accelerator, splits)
    if accelerator.is_main_process:
        print(f"world size {accelerator.num_processes}: all gradients and rounds as in the reference")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
