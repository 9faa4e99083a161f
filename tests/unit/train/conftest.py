from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator

from digitdist.distributed import process_restored, start_accelerator
from digitdist.train import prepare


@pytest.fixture
def alone(mnist_root: Path) -> Iterator[Accelerator]:
    """As a training makes it, on one process, which is left as it was."""
    with process_restored(["train"]):
        setup = prepare([], [f"data.root={mnist_root}", "tracking.wandb=disabled"])
        yield start_accelerator(setup.config, setup.plan)
