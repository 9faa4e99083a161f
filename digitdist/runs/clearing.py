"""What an earlier training has left in a run's folder, taken out of the way of the next one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from digitdist.checkpoint import folders, step_of
from digitdist.files import TEMPORARY, remove
from digitdist.runs.folder import CONFIG, DATA_SET, ENVIRONMENT, LOCK, PREDICTIONS, RESULT
from digitdist.runs.metrics import METRICS
from digitdist.world import print_main

RUN_FILES = (METRICS, RESULT, PREDICTIONS, ENVIRONMENT, DATA_SET, "trace.json")  # which another host needs to go on
FILES = (*RUN_FILES, CONFIG, LOCK)
FOLDERS = ("checkpoints", "wandb", "plots")


def begin_anew(folder: Path, with_checkpoints: bool) -> None:
    """Removes everything that an earlier training has left, so that none of it passes for the next one's; its checkpoints only
    `with_checkpoints`: else they get another name."""
    if with_checkpoints:
        remove(folder / "checkpoints")
    else:
        set_aside(folder / "checkpoints", after=-1)
    for name in ("wandb", "plots", "report.html", *RUN_FILES):
        remove(folder / name)


def set_aside(checkpoints: Path, after: int) -> None:
    """Gives another name to the checkpoints after a step, from which no training goes on: they are damaged, could not be read,
    or are another training's."""
    for folder in folders(checkpoints):
        if step_of(folder) > after:
            renamed = _rename(folder, f"skipped-{folder.name}")
            print_main(f"{folder} is not resumed, and is now {renamed.name}")


def move_aside(folder: Path, names: Iterable[str] = (*FILES, *FOLDERS)) -> None:
    """Gives another name to what stands where a run has a file and is none, or cannot be read, or where it has a folder and is
    none."""
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            continue
        is_right = stat.S_ISREG(path.lstat().st_mode) if name in FILES else path.is_dir()
        if not (is_right and os.access(path, os.R_OK)):
            moved = _rename(path, f"{name}.unexpected")
            print_main(f"{path} is not a {'file' if name in FILES else 'folder'} that can be read, and is now {moved.name}")


def remove_temporary(folder: Path) -> None:
    """Removes what a process has left that was killed while it wrote."""
    for place in (folder, folder / "wandb"):
        for file in place.glob(TEMPORARY):
            remove(file)


def _rename(path: Path, name: str) -> Path:
    """Renames a file or a folder to `name`, or one like it that is not there yet."""
    names = (path.with_name(name if number == 1 else f"{name}-{number}") for number in count(1))
    free = next(new for new in names if not os.path.lexists(new))
    path.rename(free)
    return free
