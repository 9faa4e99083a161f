from __future__ import annotations

from pathlib import Path

import pytest

from digitdist import checkpoint
from digitdist.checkpoint import Checkpoint
from digitdist.config import Config
from digitdist.data import DATA_SETS
from digitdist.errors import UserError
from digitdist.runs import find_run, find_run_or_study, runs_of
from digitdist.runs.finding import StoredRun


def test_a_run_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run in runs"):
        find_run("mine")
    (tmp_path / "runs/yours").mkdir(parents=True)
    (tmp_path / "runs/yours/config.yaml").touch()
    with pytest.raises(UserError, match="yours"):
        find_run("mine")
    assert find_run("yours") == Path("runs/yours")
    assert find_run(str(tmp_path / "runs/yours")) == tmp_path / "runs/yours"


@pytest.mark.parametrize("digits", [16, 300, 5000])
def test_a_step_that_is_no_files_name_is_refused_whoever_tells_it(tmp_path: Path, digits: int):
    state = {"step": 1, "best": {"step": 10 ** (digits % 4000)}}
    checkpoint.write(tmp_path / "checkpoints", Checkpoint({"model": {}}, state), keep=1)
    run = StoredRun(tmp_path, Config(), DATA_SETS["mnist"])
    for which in ("best", "9" * digits):
        with pytest.raises(UserError, match="is not allowed; it takes last, best or a step"):
            run.checkpoint(which)


def make_runs(*folders: str, finished: bool = True) -> None:
    for folder in map(Path, folders):
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        if finished:
            (folder / "result.json").touch()


def test_a_study_is_its_finished_runs_by_seed_and_a_run_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_runs("runs/s/seed-10", "runs/s/seed-2", "runs/one", "runs/s/seed-x", "runs/s/seed-03")
    make_runs("runs/s/seed-0", finished=False)
    assert runs_of("s") == [Path("runs/s/seed-2"), Path("runs/s/seed-10")]
    assert runs_of(str(tmp_path / "runs/s")) == [tmp_path / "runs/s/seed-2", tmp_path / "runs/s/seed-10"]
    assert runs_of("one") == [Path("runs/one")]
    assert runs_of("s/seed-2") == [Path("runs/s/seed-2")] == [find_run("s/seed-2")]
    assert find_run_or_study("s") == Path("runs/s")
    assert find_run_or_study("one") == Path("runs/one")


def test_what_is_no_run_or_no_study_is_told_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_runs("runs/one", "runs/s/seed-0", "runs/g/optim.lr=0.1/seed-0")
    make_runs("runs/new/seed-0", finished=False)
    with pytest.raises(UserError, match="s: a study of 1 runs, not a run; name one of them, such as runs/s/seed-0"):
        find_run("s")
    with pytest.raises(UserError, match=r"a grid of 1 studies; name one of them, such as runs/g/optim.lr=0\.1"):
        runs_of("g")
    with pytest.raises(UserError, match="new: none of its 1 runs is finished"):
        runs_of("new")
    for find in (find_run, find_run_or_study, runs_of):
        with pytest.raises(UserError, match=r"g/optim.lr=0.1 \(a study\), new \(a study\), one, s \(a study\)"):
            find("another")


def test_a_name_too_long_for_a_folder_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run of that folder or name"):
        runs_of("x" * 300)
