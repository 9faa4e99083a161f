"""Finding a run on disk, wherever it was trained or has been copied to, and the model that it ended with."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from digitdist.checkpoint import Checkpoint, DamagedCheckpoint, folder_name, folders, newest_good, read
from digitdist.config import Config, DataConfig, load_config, load_stored_config
from digitdist.data import DataSetInfo, known_info
from digitdist.errors import UserError, in_one_line
from digitdist.model_state import load_model_state, load_transient_buffers
from digitdist.models import build_model
from digitdist.runs.folder import DATA_SET


@dataclass(frozen=True)
class StoredRun:
    """A run on disk: its folder, its configuration and the form of the data set that it was trained on."""

    folder: Path
    config: Config
    info: DataSetInfo

    def check_form(self, info: DataSetInfo) -> None:
        """Refuses images that the run's network does not take.

        Raises:
            UserError: they have another shape, or other classes.
        """
        if (info.image_shape, info.num_classes) != (self.info.image_shape, self.info.num_classes):
            raise UserError(
                f"{info.name} has {info.num_classes} classes and images of shape {info.image_shape}, the run's"
                f" {self.info.name} {self.info.num_classes} and {self.info.image_shape}; give the run's own data set"
            )

    def checkpoint(self, which: str) -> Checkpoint:
        """The checkpoint `which`: ``last`` (the newest good one), ``best`` by validation accuracy, or a step.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        parent = self.folder / "checkpoints"
        last = newest_good(parent, partial(print, file=sys.stderr))
        if last is None:
            raise UserError(f"{self.folder}: no good checkpoint in {parent}; train the run first")
        if which == "last":
            return last
        if which == "best":
            if not last.state["best"]:
                raise UserError(f"{self.folder}: no best checkpoint; it is chosen only where data.validation holds images out")
            which = str(last.state["best"]["step"])
        if not which.isdecimal():
            raise UserError(f"--checkpoint {which} is not allowed; it takes last, best or a step")
        try:
            return read(parent / folder_name(int(which)))
        except DamagedCheckpoint as damage:
            raise UserError(f"{damage}; checkpoints of this run: {[f.name for f in folders(parent)]}") from None

    def model(self, stored: Checkpoint) -> nn.Module:
        """The run's network with the weights that are evaluated, the moving average where there is one; on the CPU.

        Raises:
            UserError: the network cannot be built, or the weights do not fit it.
        """
        model = build_model(self.config.model, self.config.seed, self.info)
        try:
            load_model_state(model, stored.tensors.get("ema") or stored.tensors["model"])
            load_transient_buffers(model, stored.tensors.get("transient", {}))
        except RuntimeError as error:
            raise UserError(f"{stored.folder} does not fit the model: {in_one_line(error)}") from None
        return model


def find_run(name: str, runs: str = "runs") -> Path:
    """The folder of a run, given by its folder or by its name in `runs`.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(os.path.expanduser(name)), Path(runs) / name):
        if os.path.isfile(folder / "config.yaml"):
            return folder
    existing = sorted(path.parent.name for path in Path(runs).glob("*/config.yaml"))
    known = f"in {runs} there are {', '.join(existing)}" if existing else f"there is no run in {runs}"
    raise UserError(f"{name}: no run of that folder or name (a run has a config.yaml); {known}")


def load_run(name: str, overrides: Sequence[str]) -> StoredRun:
    """A run with its own configuration, changed by `overrides`.

    Raises:
        UserError: there is no such run, or a mistake in `overrides`.
    """
    folder = find_run(name, load_config((), [o for o in overrides if o.startswith("run.dir=")]).run.dir)
    config = load_stored_config(folder / "config.yaml", overrides)
    return StoredRun(folder, config, read_info(folder, config.data))


def read_info(folder: Path, data: DataConfig) -> DataSetInfo:
    """The form of the data set that the run in `folder` was trained on.

    Raises:
        UserError: its file is damaged, or missing and not that of a data set with a name.
    """
    try:
        return DataSetInfo.from_json((folder / DATA_SET).read_text())
    except FileNotFoundError:
        info = known_info(data)  # earlier versions wrote no such file
        if info is None:
            raise UserError(f"{folder / DATA_SET} is missing; train the run again") from None
        return info
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / DATA_SET} is damaged ({in_one_line(error)}); train the run again") from None
