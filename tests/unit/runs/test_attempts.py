from __future__ import annotations

import subprocess
from pathlib import Path

from digitdist.runs.attempts import git_commit


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
