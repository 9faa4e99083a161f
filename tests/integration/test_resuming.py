"""A run that is broken off and goes on ends as the unbroken one does, on several ranks, in every mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.launching import ROOT, torchrun


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_breaking_off_saving_and_harmless_keys_change_no_bit(tmp_path: Path, mnist_root: Path):
    worker = ("-m", "helpers.resume_worker", str(mnist_root), str(tmp_path / "runs"))
    done = torchrun(3, *worker, cwd=ROOT / "tests", env={"PYTHONPATH": str(ROOT)}, timeout=580)
    assert done.code == 0, done.err
    groups = json.loads(done.out.splitlines()[-1])
    differs = groups.pop("differs")
    for name, runs in groups.items():
        for case, run in runs.items():
            assert run["weights"] == runs["unbroken"]["weights"], (name, case)
            if case != "changed":  # with lines at other steps, and evaluations in other batches
                assert run["loss"] == runs["unbroken"]["loss"], (name, case)
                assert run["lines"] == runs["unbroken, saved" if "saved" in case else "unbroken"]["lines"], (name, case)
    assert "step 3: rank 1 and rank 0 differ in mean" in differs["in its middle"]
    assert "step 5: rank 1 and rank 0 differ in mean" in differs["at its end"]
