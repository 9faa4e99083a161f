from __future__ import annotations

from pathlib import Path

import pytest

from digitdist import checkpoint
from digitdist.checkpoint import Checkpoint
from digitdist.config import Config
from digitdist.data import DATA_SETS
from digitdist.errors import UserError
from digitdist.runs import find_run
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
