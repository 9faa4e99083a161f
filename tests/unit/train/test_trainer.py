"""The trainer in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import transfers

from digitdist.distributed import Heartbeat, start_accelerator
from digitdist.runs import open_run
from digitdist.train import Trainer, prepare


@pytest.mark.parametrize("mode", ["ddp", "exact"])
@pytest.mark.parametrize("extra", [(), ("augment.rotate=9", "optim.clip_norm=1", "train.accumulate=3", "data.focus=2")])
def test_a_step_in_which_nothing_is_due_brings_nothing_to_the_host(
    place: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, mode: str, extra: tuple[str, ...]
):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))  # which exact mode switches on
    monkeypatch.chdir(place)
    setup = prepare([], [f"sync.mode={mode}", "tracking.wandb=disabled", "data.root=data", *extra])
    accelerator = start_accelerator(setup.config, setup.plan)
    run = open_run(setup.config, setup.plan, setup.splits, 100, [])
    trainer = Trainer(setup, accelerator, run, Heartbeat(run.heartbeat, setup.plan.world))
    trainer.reads_every_step = False  # as where the device is another one
    batches = trainer.batches()
    batch = next(batches)  # which starts the loader's pass, on the host
    with transfers.none_allowed():
        for _ in range(setup.config.train.log_every - 1):
            assert trainer.train_step(batch) is None
            batch = next(batches)
        with pytest.raises(transfers.Transfer):
            trainer.train_step(batch)  # which has a line in the log
