"""Runs on disk that no training has made: their weights are those that a network begins with."""

from __future__ import annotations

from pathlib import Path

import torch

from digitdist import checkpoint, config
from digitdist.checkpoint import Checkpoint
from digitdist.config import load_config
from digitdist.data import DATA_SETS, DataSetInfo
from digitdist.loading import card_content
from digitdist.models import build_model
from digitdist.runs import load_run, mark_run

MNIST = DATA_SETS["mnist"]


def made(
    folder: Path, *overrides: str, ema: bool = False, info: DataSetInfo = MNIST, precision: str = "fp32"
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of random weights, trained in `precision` by what it says, and the weights that are evaluated."""
    settings = load_config((), [*overrides, "run.name=m"])
    tensors = {
        name: build_model(settings.model, settings.seed + number, info).state_dict()
        for number, name in enumerate(("model", "ema")[: 1 + ema])
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_bytes(config.dump_config(settings))
    (folder / "data_set.json").write_text(info.to_json())
    state = {"step": 5, "best": None, "precision": precision}
    checkpoint.write(folder / "checkpoints", Checkpoint(tensors, state), keep=1)
    mark_run(folder)
    return folder, tensors["ema" if ema else "model"]


def made_run(folder: Path, *overrides: str, precision: str = "fp32") -> Path:
    """The folder alone of such a run."""
    return made(folder, *overrides, precision=precision)[0]


def made_folder(run: Path, folder: Path) -> Path:
    """The model of a run as it is passed on."""
    loaded = load_run(str(run), [])
    stored = loaded.checkpoint("last")
    folder.mkdir()
    for name, content in card_content(loaded, stored, loaded.model(stored), "# A card\n").items():
        (folder / name).write_bytes(content)
    return folder
