from __future__ import annotations

from pathlib import Path

import pytest

from digitdist.errors import UserError
from digitdist.runs import find_run


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
