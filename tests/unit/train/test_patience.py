"""A training that ends since accuracy on held-out images rises no more: where, and what is told of it.

integration/test_resuming.py has it on several ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from helpers.runs import assert_same_run, attempts, events, result
from helpers.short_runs import train

from digitdist.config import load_config
from digitdist.errors import UserError
from digitdist.train.cadence import Cadence

# 4 steps an epoch, and an accuracy that rises now and then.
COMMON = ("data.batch_size=20", "data.validation=10", "train.epochs=12", "optim.lr=0.0005", "train.log_every=1", "seed=4")
Train = Callable[..., Path]


@pytest.fixture
def trains(alone: Accelerator, tmp_path: Path, mnist_root: Path) -> Train:
    """Trains a run of that name; returns its folder."""

    def train_run(name: str, *options: str, **how: int) -> Path:
        own = (f"run.dir={tmp_path}", f"run.name={name}", *COMMON, *options)
        folder, lines = train(alone, str(mnist_root), own, **how)
        assert not lines
        return folder

    return train_run


def accuracies(folder: Path) -> dict[int, float]:
    """Accuracy on held-out images by step."""
    return {event["step"]: event["validation/accuracy"] for event in events(folder) if "validation/accuracy" in event}


def end_by_hand(found: dict[int, float], patience: int) -> int | None:
    """The step of the last of `patience` evaluations in a row that are no better than the best one before them."""
    best, waited = -1.0, 0
    for step, accuracy in found.items():
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
        if waited == patience:
            return step
    return None


@pytest.mark.parametrize(
    ("step", "best", "over"),
    [
        (60, None, False),
        (60, {"step": 60, "evaluated": 60}, False),
        (90, {"step": 60, "evaluated": 90}, False),
        (120, {"step": 60, "evaluated": 120}, True),
        (150, {"step": 60, "evaluated": 150}, True),
        (120, {"step": 60, "evaluated": 90}, False),  # not evaluated there, when evaluations were further apart
        (121, {"step": 60, "evaluated": 120}, False),
        (120, {"step": 60}, False),  # of an earlier version
        (120, {"step": 70, "evaluated": 120}, True),  # the end of a run that was then made longer
        (95, {"step": 60, "evaluated": 95}, False),
        (125, {"step": 60, "evaluated": 125}, True),
    ],
)
def test_patience_counts_the_evaluations_that_are_due_after_the_best_one(step: int, best: dict | None, over: bool):
    cadence = Cadence(last_step=1000, log_every=1, evaluate_every=30, save_every=0, check_every=0, patience=2)
    assert cadence.is_out_of_patience(step, best) is over
    assert not Cadence(1000, 1, 30, 0, 0).is_out_of_patience(step, best), "without it, a training never ends so"


@pytest.mark.parametrize("mode", ["ddp", "exact", "local"])
def test_a_run_ends_where_counting_by_hand_says_and_is_until_there_the_run_without_patience(trains: Train, mode: str):
    own = (f"sync.mode={mode}", "sync.every=3", "optim.ema=0.5")
    whole = accuracies(trains("whole", *own))
    ends = {patience: end_by_hand(whole, patience) for patience in (1, 2, 3)}
    assert len({*ends.values()} - {None}) > 1, "they are tried at different steps"
    for patience, end in ends.items():
        folder = trains(f"patient-{patience}", *own, f"train.patience={patience}")
        assert result(folder)["ended"] == ("train.patience" if end else "train.epochs")
        assert result(folder)["steps"] == (end or 48)
        until = trains(f"until-{patience}", *own, f"train.max_steps={end or 48}")
        assert result(until)["ended"] == ("train.max_steps" if end else "train.epochs")
        assert_same_run(folder, until)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_stop_or_a_kill_at_any_step_changes_neither_the_end_nor_a_bit(trains: Train, how: str):
    own = ("train.patience=2", "checkpoint.every_steps=3")
    unbroken = trains("unbroken", *own)
    end = result(unbroken)["steps"]
    assert (result(unbroken)["ended"], end) == ("train.patience", end_by_hand(accuracies(unbroken), 2))
    for step in range(2, end + 2):
        folder = trains(f"broken-{step}", *own, **{how: step})
        assert_same_run(trains(f"broken-{step}", *own), unbroken)
        assert result(folder)["ended"] == "train.patience"


def test_a_run_that_was_killed_before_its_result_was_written_ends_at_its_last_checkpoint(trains: Train):
    folder = trains("a", "train.patience=2")
    before, lines = result(folder), events(folder)
    (folder / "result.json").unlink()
    trains("a", "train.patience=2")
    assert result(folder)["weights_sha256"] == before["weights_sha256"]
    assert (result(folder)["steps"], result(folder)["ended"]) == (before["steps"], "train.patience")
    assert events(folder) == lines


def test_a_run_that_has_ended_so_is_finished_until_its_patience_is_raised(trains: Train):
    folder = trains("a", "train.patience=1")
    end = result(folder)["steps"]
    for options in ((), ("train.epochs=20",)):
        trains("a", "train.patience=1", *options)
        assert (len(attempts(folder)), result(folder)["steps"]) == (1, end)
    trains("a", "train.patience=0")
    assert [attempt["step"] for attempt in attempts(folder)] == [0, end]
    assert (result(folder)["steps"], result(folder)["ended"]) == (48, "train.epochs")
    assert_same_run(folder, trains("whole"))


def test_evaluations_that_were_not_made_are_not_counted(trains: Train):
    """With patience and more evaluations from a checkpoint on at which none was made."""
    folder = trains("a", "train.eval_every=3", "train.patience=50", "checkpoint.every_steps=4", kill=22)
    assert [*accuracies(folder)] == [12]
    trains("a", "train.patience=1")
    found = accuracies(folder)
    assert [*found][:2] == [12, 24]
    assert result(folder)["steps"] >= 24


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("train.patience=2",), "train.patience=2 is not allowed with data.validation=0: "),
        (
            ("train.patience=1", "data.validation=9", "train.eval_every=0"),
            "train.patience=1 is not allowed with train.eval_every=0: ",
        ),
        (("train.patience=-1",), "train.patience=-1 is not allowed; train.patience takes a whole number at least 0"),
    ],
)
def test_patience_without_what_it_needs_is_refused(options: tuple[str, ...], reason: str):
    with pytest.raises(UserError) as reported:
        load_config((), options)
    assert str(reported.value).startswith(reason)
