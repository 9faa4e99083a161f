"""A simulated accelerator, ``sim``. Its tensors lie in the CPU's memory and the CPU's kernels compute on them, so that a run on
it has the bits of a run on the CPU. Like any other accelerator it refuses a host tensor among its own, its generator wants a
seed of its own, and the host waits for it wherever something crosses.

    python tests/helpers/simulated_device.py MODULE [ARGS...]

does what ``python -m MODULE ARGS...`` does, with ``sim`` as the accelerator of this process; also under torchrun, where ranks
meet over gloo. With SIMULATED_TRANSFERS=FILE each rank appends to FILE.rankN one JSON line for each time that its host waits:
the step being taken, from the reading of its batch on (0 outside of steps), whether something is due in it, what crossed, and
where.

Copies that do not block are no such time: those to the device from pinned memory, and those to the host. The latter hold
nonsense until an event that was recorded after them has come, which takes SIMULATED_LAG queries (none unless told).
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def unsupported() -> str:
    """Why this torch cannot simulate a device; empty where it can."""
    from torch.utils import backend_registration

    if hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        return ""
    return f"torch {torch.__version__} takes no device whose backend is written in Python"


def start() -> None:
    """Makes the simulated device this process's accelerator, for good."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from helpers.simulated_module import NAME, DeviceModule
    from helpers.simulated_tensor import SimulatedMode, patch_torch

    _setup_privateuseone_for_python_backend(NAME, DeviceModule())
    patch_torch()
    SimulatedMode().__enter__()
    patch_accelerate()


def patch_accelerate() -> None:
    """Has Accelerate, which looks for the devices that it knows, use this one, and several of them as several GPUs."""
    from accelerate import Accelerator
    from accelerate.state import DistributedType, PartialState

    from helpers.simulated_tensor import SIM

    def prepare(self: PartialState, cpu: bool = False, *_: Any) -> tuple[str | None, DistributedType]:
        assert not cpu, "this process is to use the simulated device"
        return ("gloo", DistributedType.MULTI_GPU) if "LOCAL_RANK" in os.environ else (None, DistributedType.NO)

    def choose(self: PartialState) -> None:
        self.device = SIM

    PartialState._prepare_backend, PartialState.set_device = prepare, choose
    Accelerator.local_process_index = property(lambda self: 0)  # by which it numbers devices: each rank has one of its own


def note_steps() -> None:
    """Has `Transfers` know which step the trainer takes, and whether something is due in it."""
    from digitdist.train.trainer import Trainer
    from helpers.simulated_module import Transfers

    batches, train_step = Trainer.batches, Trainer.train_step

    @contextlib.contextmanager
    def step_of(trainer: Trainer) -> Iterator[None]:
        Transfers.step, Transfers.due = trainer.step + 1, _is_due(trainer, trainer.step + 1)
        try:
            yield
        finally:
            Transfers.step, Transfers.due = 0, False

    def noted_batches(self: Trainer) -> Iterator[Any]:
        shares = batches(self)
        while True:
            with step_of(self):
                batch = next(shares, None)
            if batch is None:
                return
            yield batch

    def noted_step(self: Trainer, batch: Any) -> Any:
        with step_of(self):
            return train_step(self, batch)

    Trainer.batches, Trainer.train_step = noted_batches, noted_step


def _is_due(trainer: Any, step: int) -> bool:
    """Whether a line, an evaluation, a checkpoint or a comparison of weights is due after `step`; in local mode they wait for
    the end of a round."""
    due, sync = trainer.cadence.between(trainer.synced_step, step), trainer.config.sync
    ends_round = sync.mode != "local" or step % sync.every == 0
    needs_equal = trainer.cadence.needs_equal_weights(step)
    return needs_equal or (ends_round and (due.log or due.evaluate or due.save or due.check))


def main() -> None:
    module, sys.argv = sys.argv[1], sys.argv[1:]
    sys.path[0] = os.getcwd()  # as with -m
    sys.path.append(str(Path(__file__).parents[1]))
    start()
    if "SIMULATED_TRANSFERS" in os.environ:
        note_steps()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
