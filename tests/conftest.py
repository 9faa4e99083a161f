from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

os.environ["GOMP_SPINCOUNT"] = "0"  # read when torch is imported: tests run side by side, and threads that spin slow each other

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from helpers.launching import HIDING, STATE
from helpers.wandb_server import Server
from hypothesis import settings

from digitdist.config import load_config
from digitdist.data import Splits, load_splits

# A busy machine may make any example slow; each test has a timeout of its own.
settings.register_profile("digitdist", deadline=None)
settings.load_profile("digitdist")


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs from a run whose marker expression does not ask for the tests of them: the others start more processes
    than there may be GPUs, and expect a CPU. Nothing has looked for a GPU until here."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ.update(HIDING)
    os.environ["XDG_STATE_HOME"] = STATE.name


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST, unpacked once for all tests."""
    root = tmp_path_factory.mktemp("data")
    load_splits(load_config((), [f"data.root={root}"]).data, seed=0)
    return root


@pytest.fixture(scope="session")
def splits(mnist_root: Path) -> Splits:
    return load_splits(load_config((), [f"data.root={mnist_root}"]).data, seed=0)


@pytest.fixture
def place(tmp_path: Path, mnist_root: Path) -> Path:
    """A folder to launch in, which has MNIST already."""
    (tmp_path / "data").symlink_to(mnist_root)
    return tmp_path


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    """As the trainer makes it, on one process."""
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))


@pytest.fixture
def server() -> Iterator[Server]:
    """A stand-in for the W&B server."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _same_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with one thread, without a W&B key, and without a launcher's variables."""
    torch.set_num_threads(1)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
