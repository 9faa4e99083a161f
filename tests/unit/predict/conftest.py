from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from digitdist import checkpoint
from digitdist.config import dump_config, load_config
from digitdist.data import DATA_SETS, Splits, normalise
from digitdist.models import build_model

MNIST = DATA_SETS["mnist"]


@pytest.fixture(scope="session")
def trained(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A run's folder with a checkpoint of 250 steps, and the model in it; elsewhere than its configuration says."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    run.mkdir()
    torch.set_num_threads(1)
    config = load_config()
    config.data.root = config.run.dir = "/proc/another/machine"
    model = build_model(config.model, seed=0, info=MNIST)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for places in torch.randperm(60000, generator=torch.Generator().manual_seed(0)).split(100)[:250]:
        optimizer.zero_grad()
        logits = model(normalise(splits.train.images[places], DATA_SETS["mnist"]))
        nn.functional.cross_entropy(logits, splits.train.labels[places]).backward()
        optimizer.step()
    state = {"step": 250, "best": None}
    checkpoint.write(run / "checkpoints", checkpoint.Checkpoint({"model": model.state_dict()}, state), keep=1)
    (run / "config.yaml").write_bytes(dump_config(config))
    return run, model.eval()
