from __future__ import annotations

import io
from pathlib import Path

import pytest
from filelock import FileLock

from digitdist.distributed import StopRequest
from digitdist.errors import UserError
from digitdist.study import Progress, Slot, plan_study, running, train_all
from digitdist.study.__main__ import _check_independent


def test_runs_in_which_another_study_works_are_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running, "LEAVING_S", 0.2)
    trainings = plan_study(tmp_path / "mine", 2, [], [])
    trainings[1].folder.mkdir(parents=True)
    shown = io.StringIO()
    with (
        FileLock(trainings[1].folder / ".lock"),
        pytest.raises(UserError, match="seed-1: another training works in it, perhaps"),
    ):
        train_all(trainings, [Slot({}, 1)], Progress("mine", 2, 0, shown), StopRequest())
    assert "seed-1: another training works in this run; waits" in shown.getvalue()
    assert not trainings[0].folder.exists()


@pytest.mark.parametrize(
    ("against", "why"),
    [
        (["other/seed-0", "other/seed-1", "other/seed-0"], "other/seed-0 is there twice, and would count double"),
        (["other", "other/seed-1"], "other/seed-1 is there twice, and would count double"),
        (["mine"], "mine is not allowed: it is of the study itself"),
        (["other/seed-0", "mine/seed-3"], "mine/seed-3 is not allowed: it is of the study itself"),
    ],
)
def test_runs_that_would_count_double_are_refused(against: list[str], why: str):
    with pytest.raises(UserError, match=why):
        _check_independent([Path("runs") / name for name in against], Path("runs/mine"))
    _check_independent([Path("runs/other/seed-0"), Path("runs/other/seed-1")], Path("runs/mine"))
