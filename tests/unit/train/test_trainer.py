"""The trainer in fp16 in this process; integration/test_simulated_device.py has it in fp32, on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import fp16_on_cpu, transfers

from digitdist.distributed import Heartbeat, process_restored, start_accelerator
from digitdist.runs import open_run
from digitdist.train import Trainer, prepare


@pytest.fixture
def build_trainer(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Trainer]]:
    """A trainer as on a device whose values the host would have to wait for, with the options that it is given."""
    monkeypatch.chdir(place)
    fp16_on_cpu.put_in(monkeypatch)

    def build(*options: str) -> Trainer:
        setup = prepare([], ["tracking.wandb=disabled", "data.root=data", *options])
        accelerator = start_accelerator(setup.config, setup.plan)
        run = open_run(setup.config, setup.plan, setup.splits, setup.ending, [])
        trainer = Trainer(setup, accelerator, run, Heartbeat(run.heartbeat, setup.plan.world))
        trainer.reads_every_step = False
        return trainer

    with process_restored(["train"]):
        yield build


@pytest.mark.parametrize("mode", ["ddp", "exact"])
@pytest.mark.parametrize("extra", [(), ("augment.rotate=9", "optim.clip_norm=1", "train.accumulate=3", "data.focus=2")])
def test_a_step_in_which_nothing_is_due_brings_nothing_to_the_host(
    build_trainer: Callable[..., Trainer], mode: str, extra: tuple[str, ...]
):
    trainer = build_trainer(f"sync.mode={mode}", "train.precision=fp16", "train.log_every=5", *extra)
    batches = trainer.batches()
    batch = next(batches)  # which starts the loader's pass, on the host
    with transfers.none_allowed():
        for _ in range(4):
            assert trainer.train_step(batch) is None
            batch = next(batches)
        with pytest.raises(transfers.Transfer):
            trainer.train_step(batch)  # which has a line in the log


def test_nor_does_a_step_of_local_mode_before_its_round_ends(build_trainer: Callable[..., Trainer]):
    trainer = build_trainer("sync.mode=local", "sync.every=5", "train.log_every=2", "train.precision=fp16")
    batches = trainer.batches()
    batch = next(batches)
    with transfers.none_allowed():
        for _ in range(4):
            assert trainer.train_step(batch) is None
            batch = next(batches)
        with pytest.raises(transfers.Transfer):
            trainer.train_step(batch)
