"""Runs a module in fp16 on CPUs, also under torchrun:

    python tests/helpers/fp16_on_cpu.py digitdist.train train.precision=fp16

Accelerate makes fp16 on GPUs alone, of autocast to float16 and a `GradScaler`. Torch has both on CPUs too, and here they are
put in. Environment variables ask for what would take thousands of steps otherwise:

FP16_OVERFLOW="1 5@0"     the gradients overflow in float16 in step 1 on all ranks, in step 5 on rank 0
FP16_GROWTH_INTERVAL=3    steps without an overflow after which the scale grows (2000 otherwise)
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import digitdist.distributed.plan
from digitdist.sync.loss import TrainingLoss

TOO_LARGE = 2.0**40  # times the gradient of the loss: that of the logits is infinite in float16


class Fp16Accelerator(Accelerator):
    """With what it makes on a GPU."""

    def __init__(self, mixed_precision: str, **options: Any):
        super().__init__(mixed_precision=mixed_precision, **options)
        if mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", growth_interval=int(os.environ.get("FP16_GROWTH_INTERVAL", "2000")))


def overflows(step: int) -> bool:
    """Whether the gradients of this rank are to overflow in the step that follows `step`."""
    places = (place.partition("@") for place in os.environ.get("FP16_OVERFLOW", "").split())
    return any(int(at) == step + 1 and rank in ("", os.environ.get("RANK", "0")) for at, _, rank in places)


def put_in(patch: pytest.MonkeyPatch) -> None:
    """Has digitdist take fp16 on CPUs."""
    lacks, total = digitdist.distributed.plan.lacks, TrainingLoss.total

    def overflowing_total(self: TrainingLoss, batch: Any, step: int) -> torch.Tensor:
        loss = total(self, batch, step)
        if overflows(step):
            loss.register_hook(lambda gradient: gradient * TOO_LARGE)
        return loss

    patch.setattr(
        "digitdist.distributed.plan.lacks", lambda precision, device: precision != "fp16" and lacks(precision, device)
    )
    patch.setattr("digitdist.distributed.accelerator.Accelerator", Fp16Accelerator)
    patch.setattr(TrainingLoss, "total", overflowing_total)


if __name__ == "__main__":
    sys.path[:1] = [os.getcwd(), str(Path(__file__).parents[1])]  # as with python -m, and the helpers
    del sys.argv[0]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    put_in(pytest.MonkeyPatch())
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
