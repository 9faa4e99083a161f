"""Runs as a training leaves them, without one: of random weights."""

from __future__ import annotations

from pathlib import Path

from digitdist import checkpoint
from digitdist.checkpoint import Checkpoint
from digitdist.config import dump_config, load_config
from digitdist.data import DATA_SETS
from digitdist.loading import card_content
from digitdist.models import build_model
from digitdist.runs import load_run, mark_run

MNIST = DATA_SETS["mnist"]


def made_run(folder: Path, *overrides: str, precision: str = "fp32") -> Path:
    """A run of random weights, which a training of this user has made."""
    config = load_config((), overrides)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_bytes(dump_config(config))
    weights = build_model(config.model, 0, MNIST).state_dict()
    state = {"step": 5, "best": None, "precision": precision}
    checkpoint.write(folder / "checkpoints", Checkpoint({"model": weights}, state), keep=1)
    mark_run(folder)
    return folder


def made_folder(run: Path, folder: Path) -> Path:
    """The model of a run as it is passed on."""
    loaded = load_run(str(run), [])
    stored = loaded.checkpoint("last")
    folder.mkdir()
    for name, content in card_content(loaded, stored, loaded.model(stored), "# A card\n").items():
        (folder / name).write_bytes(content)
    return folder
