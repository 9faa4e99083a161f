from __future__ import annotations

from pathlib import Path

import pytest
from helpers.made_up_runs import make_run

from digitdist.errors import UserError
from digitdist.study import plan_study


def test_each_seed_is_a_run_of_the_trainers_own_command():
    """Also with quick.yaml, which begins anew each time: a study goes on."""
    trainings = plan_study(Path("runs/mine"), 2, ["quick"], ["train.epochs=2"])
    assert [training.folder for training in trainings] == [Path("runs/mine/seed-0"), Path("runs/mine/seed-1")]
    assert [training.config.seed for training in trainings] == [0, 1]
    assert trainings[1].arguments == (
        *("--config=quick", "run.report=false", "tracking.group=mine", "checkpoint.resume=auto", "train.epochs=2"),
        *("seed=1", "run.dir=runs/mine", "run.name=seed-1", "tracking.name=mine seed-1"),
    )
    assert not trainings[0].is_done


@pytest.mark.parametrize("end", ["train.epochs=12", "train.patience=4"])
def test_a_run_that_is_to_end_elsewhere_is_not_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str):
    held_out = "data.validation=5000"
    make_run(tmp_path / "seed-0", 900, options=[held_out])
    monkeypatch.setattr("digitdist.runs.finished.newest_good", lambda *_: object())
    monkeypatch.setattr("digitdist.runs.finished.is_finished", lambda *_: True)
    ((same,), (other,)) = (plan_study(tmp_path, 1, [], [held_out, *more]) for more in ([], [end]))
    assert (same.is_done, other.is_done) == (True, False)


def test_what_the_user_says_of_wandb_and_pages_wins():
    options = ["tracking.group=g", "tracking.name=n", "run.report=true"]
    (training,) = plan_study(Path("runs/mine"), 1, [], options)
    assert training.arguments == ("run.report=false", *options, "seed=0", "run.dir=runs/mine", "run.name=seed-0")


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("seed=3", "seed=3 is not allowed: --seeds N trains with seeds 0 to N-1"),
        ("run.name=x", "run.name=x is not allowed"),
        ("checkpoint.resume=never", "a study goes on where it was"),
        ("optim.lr=0", "optim.lr=0 is not allowed"),
    ],
)
def test_what_a_study_cannot_do_is_refused_before_anything_is_started(option: str, why: str):
    with pytest.raises(UserError, match=why):
        plan_study(Path("runs/mine"), 2, [], [option])


def test_runs_of_two_configurations_are_not_mixed(tmp_path: Path):
    make_run(tmp_path / "seed-1", 900, options=["optim.lr=0.002"])
    with pytest.raises(
        UserError, match=r"seed-1: optim\.lr was 0\.002 and is now 0\.001; set it back, give the study another NAME"
    ):
        plan_study(tmp_path, 2, [], [])
    assert len(plan_study(tmp_path, 2, [], ["optim.lr=0.002", "train.epochs=12", "train.log_every=7"])) == 2
    assert len(plan_study(tmp_path, 2, [], ["checkpoint.allow_change=true"])) == 2


def test_a_study_has_no_room_in_a_run(tmp_path: Path):
    make_run(tmp_path / "mine", 900)
    with pytest.raises(UserError, match="mine is a run, in which no study has room"):
        plan_study(tmp_path / "mine", 2, [], [])


def test_a_study_has_no_room_in_a_grid(tmp_path: Path):
    make_run(tmp_path / "mine/optim.lr=1/seed-0", 900)
    with pytest.raises(UserError, match=r"mine is a grid of 1 studies, such as optim\.lr=1; give another NAME"):
        plan_study(tmp_path / "mine", 2, [], [])


@pytest.mark.parametrize(("end", "was"), [("train.epochs=1", "9.0"), ("train.max_steps=9", "null")])
def test_finished_runs_are_not_mixed_with_shorter_ones(tmp_path: Path, end: str, was: str):
    make_run(tmp_path / "seed-0", 900)
    name = end.partition("=")[0]
    with pytest.raises(UserError, match=f"seed-0: it is finished with {name}={was}, and is not shortened to "):
        plan_study(tmp_path, 2, [], [end])
