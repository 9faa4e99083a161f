from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from digitdist.runs.attempts import git_commit, read_attempts, run_of_launchers


def test_the_commit_is_that_of_a_repository_that_has_the_package_and_of_no_other(tmp_path: Path):
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    package = tmp_path / "site-packages/digitdist/__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    assert git_commit(package) is None
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "own.py").touch()
    subprocess.run([*git, "add", "own.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "a repository around it"], check=True)
    assert git_commit(package) is None
    subprocess.run([*git, "add", str(package)], check=True)
    subprocess.run([*git, "commit", "-qm", "its own"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_commit(package) == head


@pytest.mark.parametrize("name", ["launchers", "slurm"])
@pytest.mark.parametrize("item", [[1], {}, None])
def test_an_attempt_of_another_run_that_holds_anything_stops_no_training(tmp_path: Path, name: str, item):
    (tmp_path / "other").mkdir()
    attempt = {"step": 0, "world_size": 1, "wandb_id": "a", "launchers": [1.5], name: [item]}
    (tmp_path / "other/environment.json").write_text(json.dumps({"starts": [attempt]}))
    assert run_of_launchers(tmp_path, [1.5]) is None
    said: list[str] = []
    assert read_attempts(tmp_path / "other", said.append) == []
    assert "1 of 1 earlier attempts are lost" in said[0]
