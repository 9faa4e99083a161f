"""The runs of a study, each as a training by the trainer's own command, and what is refused before one is started."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from digitdist.config import Config, as_dict, load_config, read_stored_config, result_changes, shown
from digitdist.errors import UserError
from digitdist.runs import CONFIG, has_result, is_trained, seed_folder, studies_in

OWN = {
    "seed=": "--seeds N trains with seeds 0 to N-1",
    "run.name=": "a study's NAME names its folder in run.dir",
    "checkpoint.resume=never": "a study goes on where it was; to start over, remove its folder, or give another NAME",
}


@dataclass(frozen=True)
class Training:
    """A run of a study: its folder, its configuration, and the arguments of ``python -m digitdist.train`` that say both."""

    folder: Path
    config: Config
    arguments: tuple[str, ...]

    @property
    def is_done(self) -> bool:
        return is_trained(self.folder, self.config)


def plan_study(
    folder: Path, num_seeds: int, files: Sequence[str], overrides: Sequence[str], group: str | None = None
) -> list[Training]:
    """The trainings of a study in `folder`, with seeds 0 to `num_seeds` - 1.

    The runs have no pages of their own unless `overrides` ask for them, and are one group at W&B, `group` or the folder's name.

    Raises:
        UserError: a mistake in the configuration, or a run that is there has begun with another one.
    """
    _refuse_own_keys(overrides)
    config = load_config(files, overrides)
    if (folder / CONFIG).is_file():
        raise UserError(f"{folder} is a run, in which no study has room; give another NAME")
    if inner := studies_in(folder):
        raise UserError(
            f"{folder} is a grid of {len(inner)} studies, such as {inner[0].name}; give another NAME, or its --grid"
        )
    first = [f"--config={file}" for file in files]
    defaults = ["run.report=false"]
    if config.tracking.group is None:
        defaults.append(f"tracking.group={group or folder.name}")
    if config.checkpoint.resume == "never":
        defaults.append("checkpoint.resume=auto")
    trainings = []
    for seed in range(num_seeds):
        run = seed_folder(folder, seed)
        own = [f"seed={seed}", f"run.dir={folder}", f"run.name={run.name}"]
        if config.tracking.name is None:
            own.append(f"tracking.name={folder.name} {run.name}")
        training = Training(run, dataclasses.replace(config, seed=seed), (*first, *defaults, *overrides, *own))
        _check_unchanged(training)
        trainings.append(training)
    return trainings


def _refuse_own_keys(overrides: Sequence[str]) -> None:
    """Refuses what the study itself says to its runs; in a file it may stand, since a run's own is a file too."""
    mistakes = [f"{text} is not allowed: {why}" for text in overrides for own, why in OWN.items() if text.startswith(own)]
    if mistakes:
        raise UserError(*mistakes)


def _check_unchanged(training: Training) -> None:
    """Refuses to mix runs of two configurations in one study.

    The trainer refuses it too, but of runs that were there alone; it also knows the effective precision, which counts there.
    """
    file = training.folder / CONFIG
    if training.config.checkpoint.allow_change or not file.is_file():
        return
    stored, mistakes = read_stored_config(file)
    if mistakes:
        return  # which the trainer mends, or refuses
    same = {"train.precision": training.config.train.precision}
    before, after = as_dict(stored) | same, as_dict(training.config)
    changes = result_changes(before, after)
    if has_result(training.folder):
        changes += [
            f"it is finished with {name}={shown(before[name])}, and is not shortened to {shown(after[name])}"
            for name in ("train.epochs", "train.max_steps")
            if after[name] is not None and after[name] < (before[name] or math.inf)
        ]
    if changes:
        advice = "set it back, give the study another NAME, or set checkpoint.allow_change=true"
        raise UserError(*(f"{training.folder}: {change}; {advice}" for change in changes))
