"""What a training changes in a process that goes on after it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from digitdist.distributed import process_restored


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize("fails", [False, True])
def test_random_generators_are_put_back_however_a_training_ends(fails: bool):
    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = drawn()
    seed()
    try:
        with process_restored(["a"]):
            drawn()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert drawn() == expected
