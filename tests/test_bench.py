from __future__ import annotations

import re
from pathlib import Path

import pytest
from launching import python


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_recipes_are_measured_by_the_trainers_own_command(place: Path):
    done = python("-m", "digitdist.bench", "--recipes", "--seeds", "1", "train.max_steps=2", cwd=place, timeout=250)
    assert done.code == 0, done.err
    fast, sharp = done.out.splitlines()
    for name, line in (("fast", fast), ("sharp", sharp)):
        assert re.match(rf"{name} +test accuracy \d+\.\d+ %, deviation nan, 1 seeds", line), line
        assert re.search(r"train_seconds \d+\.\d+ .*the whole command \d+\.\d s", line), line


def test_a_training_that_fails_ends_the_measurement_and_says_why(place: Path):
    done = python("-m", "digitdist.bench", "--recipes", "--seeds", "1", "optim.lr=0", cwd=place)
    assert done.code == 1
    assert "error: optim.lr=0" in done.err
    assert "exit code 2" in done.err


def test_seeds_are_at_least_one(place: Path):
    done = python("-m", "digitdist.bench", "--recipes", "--seeds", "0", cwd=place)
    assert (done.code, done.errors) == (2, ["error: --seeds 0 is not allowed; it takes a whole number from 1 on"])
