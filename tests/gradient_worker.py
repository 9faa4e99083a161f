"""Run on every rank of a world by test_worlds.py: the claims of test_sync.py on gradients and rounds."""

from __future__ import annotations

import random
import sys

import torch
from accelerate import Accelerator
from test_sync import check_against_reference, check_hardness, check_rounds

from digitdist.config import load
from digitdist.data import load_splits
from digitdist.runtime import run_command


def main() -> None:
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)  # after Accelerate, which sets its own
    splits = load_splits(load((), [f"data.root={sys.argv[1]}"]).data, 0)
    cases = random.Random(0)
    for case in range(12):
        batch, accumulate = cases.choice([1, 2, 3, 7, 24, 50, 61]), cases.randint(1, 4)
        shards = cases.randint(accelerator.num_processes, 9)
        check_against_reference(accelerator, splits, ("ddp", "exact")[case % 2], batch, accumulate, shards)
    check_rounds(accelerator, splits)
    check_hardness(accelerator, splits)
    if accelerator.is_main_process:
        print(f"world size {accelerator.num_processes}: all gradients and rounds as in the reference")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
