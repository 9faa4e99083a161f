from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from digitdist.config import load
from digitdist.data import Splits, load_splits


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST, unpacked once for all tests."""
    root = tmp_path_factory.mktemp("data")
    load_splits(load((), [f"data.root={root}"]).data, seed=0)
    return root


@pytest.fixture(scope="session")
def splits(mnist_root: Path) -> Splits:
    return load_splits(load((), [f"data.root={mnist_root}"]).data, seed=0)


@pytest.fixture
def place(tmp_path: Path, mnist_root: Path) -> Path:
    """A folder to launch in, which has MNIST already."""
    (tmp_path / "data").symlink_to(mnist_root)
    return tmp_path


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with one thread, with no key of a tracker's, and with nothing told by a launcher."""
    torch.set_num_threads(1)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
