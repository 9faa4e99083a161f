"""Finding a run on disk, wherever it was trained or has been copied to, and the model that it ended with."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from digitdist.checkpoint import Checkpoint, DamagedCheckpoint, UnreadableCheckpoint, folder_name, folders, newest_good, read
from digitdist.config import (
    Config,
    DataConfig,
    ModelConfig,
    import_target,
    load_config,
    load_stored_config,
    read_stored_config,
    shown,
)
from digitdist.data import DataSetInfo, known_info
from digitdist.distributed import PRECISIONS, lacks
from digitdist.errors import UserError, in_one_line
from digitdist.files import MIB, read_plain
from digitdist.model_state import load_model_state, load_transient_buffers
from digitdist.models import build_model
from digitdist.runs.folder import CONFIG, DATA_SET
from digitdist.runs.origin import made_here
from digitdist.runs.studies import has_result, seeds_in, studies_in
from digitdist.world import is_main

MAX_INFO_BYTES = MIB
MAX_DIGITS = 15  # of a step; a name that is much longer is no file's


@dataclass(frozen=True)
class StoredRun:
    """A run on disk: its folder, its configuration and the form of the data set that it was trained on.

    `made_here`: by a training of this user.
    """

    folder: Path
    config: Config
    info: DataSetInfo
    made_here: bool = True

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
        try:
            last = newest_good(parent, partial(print, file=sys.stderr))
        except UnreadableCheckpoint as error:
            raise UserError(f"{error}; make it readable, or name another by --checkpoint") from None
        if last is None:
            raise UserError(f"{self.folder}: no good checkpoint in {parent}; train the run first")
        if which == "last":
            return _checked(last)
        if which == "best":
            best = _checked(last).state.get("best")
            if not best:
                raise UserError(f"{self.folder}: no best checkpoint; it is chosen only where data.validation holds images out")
            which = str(best["step"])
        if not which.isdecimal() or len(which) > MAX_DIGITS:
            raise UserError(f"--checkpoint {shown(which)} is not allowed; it takes last, best or a step")
        try:
            return _checked(read(parent / folder_name(int(which))))
        except DamagedCheckpoint as damage:
            raise UserError(f"{damage}; checkpoints of this run: {[f.name for f in folders(parent)]}") from None

    def model(self, stored: Checkpoint) -> nn.Module:
        """The run's network with the weights that are evaluated, the moving average where there is one; on the CPU.

        Raises:
            UserError: the network cannot be built, or the weights do not fit it.
        """
        target = self.config.model.target
        if target and not self.made_here:
            kind = import_target("model.target", target)
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise UserError(f"model.target={shown(target)} is not allowed; it must be a subclass of torch.nn.Module")
        model = build_model(self.config.model, self.config.seed, self.info)
        try:
            load_model_state(model, stored.tensors.get("ema") or stored.tensors["model"])
            load_transient_buffers(model, stored.tensors.get("transient", {}))
        except Exception as error:  # whoever has made the run, and its network, may have put anything there
            raise UserError(f"{stored.folder} does not fit the model: {in_one_line(error)}") from None
        return model

    def trained_precision(self, stored: Checkpoint) -> str:
        """The effective precision of the training: fp32, bf16 or fp16; that of its configuration where the state has none."""
        told = (stored.state.get("precision"), self.config.train.precision)
        return next((name for name in told if name in PRECISIONS), "fp32")

    def precision(self, stored: Checkpoint, device_type: str) -> str:
        """The same, or fp32 where a device of this type lacks it: what is computed with the run is then as in the training."""
        trained = self.trained_precision(stored)
        return "fp32" if lacks(trained, device_type) else trained


def _checked(stored: Checkpoint) -> Checkpoint:
    """`stored`, if its state tells a best step or none.

    Raises:
        UserError: it tells something else.
    """
    best = stored.state.get("best")
    if best is not None and not (isinstance(best, dict) and type(best.get("step")) is int and best["step"] >= 0):
        raise UserError(f"{stored.folder} is not a checkpoint of this program: its best one has no step")
    return stored


def find_run(name: str, runs: str = "runs") -> Path:
    """The folder of a run, given by its folder or by its name in `runs`.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(os.path.expanduser(name)), Path(runs) / name):
        if os.path.isfile(folder / CONFIG):
            return folder
    study = _study_of(name, runs)
    if study:
        some = next(iter(seeds_in(study).values()))
        raise UserError(f"{name}: a study of {len(seeds_in(study))} runs, not a run; name one of them, such as {some}")
    raise UserError(f"{name}: no run of that folder or name (a run has a config.yaml); {_existing(runs)}")


def find_run_or_study(name: str, runs: str = "runs") -> Path:
    """The folder of a run or of a study, which has no config.yaml of its own; `name` as `find_run` takes it.

    Raises:
        UserError: there is neither.
    """
    return _study_of(name, runs) or find_run(name, runs)


def runs_of(name: str, runs: str = "runs") -> list[Path]:
    """The folder of a run alone, or those of all finished runs of a study by their seeds; `name` as `find_run` takes it.

    Raises:
        UserError: there is neither a run nor a study, or none of the study's runs is finished.
    """
    study = _study_of(name, runs)
    if study is None:
        return [find_run(name, runs)]
    finished = [run for run in seeds_in(study).values() if has_result(run)]
    if not finished:
        raise UserError(f"{study}: none of its {len(seeds_in(study))} runs is finished; go on with the study first")
    return finished


def _study_of(name: str, runs: str) -> Path | None:
    """The folder of the study of that folder or name; None where there is none, or a run of its own has come first."""
    for folder in (Path(os.path.expanduser(name)), Path(runs) / name):
        if os.path.isfile(folder / CONFIG):
            return None
        if seeds_in(folder):
            return folder
        inner = studies_in(folder)
        if inner:
            few = ", ".join(str(study) for study in inner[:3])
            raise UserError(f"{name}: a grid of {len(inner)} studies; name one of them, such as {few}")
    return None


def _existing(runs: str) -> str:
    """The runs and studies that there are, in words."""
    found = [path.parent.name for path in Path(runs).glob(f"*/{CONFIG}")]
    found += [f"{folder.relative_to(runs)} (a study)" for folder in (*studies_in(Path(runs)), *_in_grids(Path(runs)))]
    return f"in {runs} there are {', '.join(sorted(found))}" if found else f"there is no run in {runs}"


def _in_grids(runs: Path) -> list[Path]:
    return [study for folder in sorted(runs.glob("*/")) for study in studies_in(folder)]


def load_run(name: str, overrides: Sequence[str], needs_data: bool = True) -> StoredRun:
    """A run with its own configuration, changed by `overrides`, which are this user's.

    What leads out of the folder of a run that no training of this user has made here is not the run's to say: its data are
    where `overrides` say, and its network is executed only where they name it, or hold ``trust=true``.

    Raises:
        UserError: there is no such run, it would execute what must not be, or there is a mistake in `overrides`.
    """
    trusted, overrides = _split_trust(overrides)
    folder = find_run(name, load_config((), [o for o in overrides if o.startswith("run.dir=")]).run.dir)
    file = folder / CONFIG
    if file.is_symlink():
        raise UserError(f"{file} is a link, which is not followed; copy the file itself")
    stored, _ = read_stored_config(file)
    info = read_info(folder, stored.data)
    if made_here(folder, stored):
        return StoredRun(folder, load_stored_config(file, overrides), info)
    defaults = [f"data.root={DataConfig().root}", "data.target=null", "data.args={}"]
    config = load_stored_config(file, [*defaults, *overrides])
    named = any(text.startswith("model.target=") for text in overrides)
    refused = []
    if config.model.target and not (trusted or named):
        refused.append(f"{_would_execute(folder, 'model', stored.model)}; if you trust it, add trust=true")
    if needs_data and stored.data.target and not config.data.target:
        refused.append(
            f"{_would_execute(folder, 'data', stored.data)}; if you trust it, give data.target and data.args yourself"
        )
    if refused:
        raise UserError(*refused)
    if trusted and config.model.target and is_main():
        print(f"trust=true: {_would_execute(folder, 'model', config.model)}", file=sys.stderr, flush=True)
    return StoredRun(folder, config, info, made_here=False)


def _split_trust(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether ``trust=true`` is among `overrides`, and the others."""
    own = [text for text in overrides if text.startswith("trust=")]
    if not {*own} <= {"trust=true", "trust=false"}:
        raise UserError(f"{shown(own[-1])} is not allowed; trust takes true or false")
    return own[-1:] == ["trust=true"], [text for text in overrides if text not in own]


def _would_execute(folder: Path, group: str, config: ModelConfig | DataConfig) -> str:
    return (
        f"{folder}, which no training of yours is known to have made here, would execute"
        f" {group}.target={shown(config.target)} with {group}.args={shown(config.args)}"
    )


def read_info(folder: Path, data: DataConfig) -> DataSetInfo:
    """The form of the data set that the run in `folder` was trained on.

    Raises:
        UserError: its file is damaged, or missing and not that of a data set with a name.
    """
    try:
        return DataSetInfo.from_json(read_plain(folder / DATA_SET, MAX_INFO_BYTES))
    except FileNotFoundError:
        info = known_info(data)  # earlier versions wrote no such file
        if info is None:
            raise UserError(f"{folder / DATA_SET} is missing; train the run again") from None
        return info
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else in_one_line(error)
        raise UserError(f"{folder / DATA_SET} is damaged ({reason}); train the run again") from None
