"""A study on disk: a folder of runs ``seed-0``, ``seed-1``, … that differ in their seed alone, or of other studies (a grid)."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from digitdist.runs.folder import CONFIG, LOCK, RESULT

SEED = "seed-"


def seed_folder(study: Path, seed: int) -> Path:
    """The folder of a study's run with this seed."""
    return study / f"{SEED}{seed}"


def seeds_in(study: Path) -> dict[int, Path]:
    """The runs of a study by their seeds, in order; empty where `study` is none."""
    found = {}
    for file in study.glob(f"{SEED}*/{CONFIG}") if os.path.isdir(study) else ():  # a name may be too long for any folder
        digits = file.parent.name.removeprefix(SEED)
        if digits.isdecimal() and digits == str(int(digits)):
            found[int(digits)] = file.parent
    return dict(sorted(found.items()))


def studies_in(folder: Path) -> list[Path]:
    """The studies in a folder, such as the combinations of a grid."""
    files = folder.glob(f"*/{SEED}*/{CONFIG}") if os.path.isdir(folder) else ()
    return [path for path in sorted({file.parent.parent for file in files}) if seeds_in(path)]


def holds_runs(folder: Path) -> bool:
    """Whether a folder is a study or a grid."""
    return bool(seeds_in(folder) or studies_in(folder))


def has_result(run: Path) -> bool:
    """Whether a training has come to its end in this folder, as far as the names of files say."""
    return os.path.isfile(run / RESULT)


def is_in_use(run: Path) -> bool:
    """Whether a training works in this folder at the moment."""
    if not (run / LOCK).is_file():
        return False
    try:
        with FileLock(run / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # it cannot be locked here, which the training that wants to will tell
        return False
