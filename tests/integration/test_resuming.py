"""A run that is broken off and goes on ends as the unbroken one does, on several ranks, in every mode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.launching import worlds


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_breaking_off_saving_and_harmless_keys_change_no_bit(tmp_path: Path, mnist_root: Path):
    worker = ("helpers.resume_worker", str(mnist_root), str(tmp_path / "runs"))
    done = worlds([3], *worker, cwd=tmp_path, timeout=580)[3]
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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_patience_ends_all_ranks_at_one_step_whatever_has_broken_them_off_and_in_exact_mode_on_any_world(
    tmp_path: Path, mnist_root: Path
):
    exact = []
    worker = ("helpers.resume_worker", str(mnist_root), str(tmp_path), "patient")
    for done in worlds((1, 2, 3), *worker, cwd=tmp_path, timeout=280).values():
        modes = json.loads(done.out.splitlines()[-1])
        for mode, runs in modes.items():
            unbroken = runs["unbroken"]
            assert unbroken["ended"] == "train.patience"
            assert 8 <= unbroken["lines"][-1]["step"] < 80
            assert all(run == unbroken for run in runs.values()), mode
        exact.append(modes["exact"]["unbroken"])
    assert exact[0] == exact[1] == exact[2]
