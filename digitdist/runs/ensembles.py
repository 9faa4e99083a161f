"""Several runs as one ensemble: how a command line names them, and what they must share so that their probabilities can be
averaged: the data set, its classes and the shape of an image. All else may differ."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from digitdist.config import load_config, shown
from digitdist.data import held_out_seed, known_info
from digitdist.errors import UserError
from digitdist.runs.finding import StoredRun, find_run_or_study, load_run, runs_of
from digitdist.runs.studies import seeds_in
from digitdist.world import is_main


def is_override(word: str) -> bool:
    """Whether it is ``key=value``, and not a run, which may have a ``=`` behind a ``/``."""
    return "=" in word.partition("/")[0]


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of runs among `arguments`, of which the first is one whatever it is, and each ``key=value``."""
    first, *others = arguments
    overrides = [text for text in others if is_override(text)]
    return [first, *(text for text in others if text not in overrides)], overrides


def count_runs(names: Sequence[str], overrides: Sequence[str]) -> int:
    """How many of `names` from the first on are those of runs or studies. A file or folder of that name here comes before a
    run of that name in ``run.dir``, one of `overrides`; the first name is not asked."""
    runs = _run_dir(overrides)
    return next((place for place, name in enumerate(names) if place and not _is_run(name, runs)), len(names))


def load_runs(names: Sequence[str], overrides: Sequence[str], needs_data: bool = True) -> list[StoredRun]:
    """The runs of these folders or names, a study standing for all its runs, each as `load_run` gives it. Several can be
    averaged. Without `needs_data` it does not matter where their data are.

    Raises:
        UserError: one of them cannot be loaded, is there twice, or does not share with the others what it must.
    """
    folders, place = list[Path](), _run_dir(overrides)
    for name in names:
        found = runs_of(name, place)
        num_others = len(seeds_in(find_run_or_study(name, place))) - len(found)
        if num_others > 0 and is_main():
            print(f"note: {name}: {num_others} of its runs are not finished, and left out", file=sys.stderr, flush=True)
        folders += found
    resolved = [folder.resolve() for folder in folders]
    twice = next((folder for number, folder in enumerate(folders) if resolved[number] in resolved[:number]), None)
    if twice:
        raise UserError(f"{twice} is given twice, and would count double; give each run once")
    runs = [load_run(str(folder), overrides, needs_data) for folder in folders]
    for run in runs[1:]:
        _check_shared(runs[0], run, needs_data)
    return runs


def check_held_out(runs: Sequence[StoredRun], split: str) -> None:
    """Refuses a `split`, train or validation, that is not the same images for all `runs`.

    Raises:
        UserError: naming two runs that hold out different images.
    """
    first = runs[0]
    for run in runs[1:]:
        if split != "test" and _held_out(run) != _held_out(first):
            raise UserError(
                f"--split {split} is not possible: {first.folder} ({_held_out(first)}) and {run.folder} ({_held_out(run)}) hold"
                " out different images, so one was trained on what the other was not; evaluate them on --split test, or train"
                " them with one data.validation_seed"
            )


def _held_out(run: StoredRun) -> str:
    data = run.config.data
    chosen = f" by seed {held_out_seed(data, run.config.seed)}" if data.validation else ""
    return f"data.validation={data.validation}{chosen}"


def _run_dir(overrides: Sequence[str]) -> str:
    return load_config((), [text for text in overrides if text.startswith("run.dir=")]).run.dir


def _is_run(name: str, runs: str) -> bool:
    here = Path(os.path.expanduser(name))
    place = here if os.path.lexists(here) else Path(runs) / name
    try:
        return os.path.isdir(place) and bool(runs_of(os.path.abspath(place)))
    except UserError:
        return False


def _check_shared(first: StoredRun, run: StoredRun, needs_data: bool) -> None:
    ours, theirs = _shared(first, needs_data), _shared(run, needs_data)
    name = next((name for name in ours if ours[name] != theirs[name]), None)
    if name:
        raise UserError(
            f"{first.folder} and {run.folder} cannot be averaged: {name} is {shown(ours[name])} and {shown(theirs[name])}; give"
            " runs of one data set, with the same classes and images of one shape"
        )


def _shared(run: StoredRun, needs_data: bool) -> dict[str, Any]:
    """What the runs of an ensemble must share, by the words that name it in a message."""
    info, data = run.info, run.config.data
    values: dict[str, Any] = {"the data set": info.name, "the shape of an image": info.image_shape}
    values |= {"the list of classes": info.classes, "data.image": info.image}
    if needs_data:
        root = None if known_info(data) else os.path.realpath(data.root)  # others are the same wherever they lie
        values |= {"data.name": data.name, "data.target": data.target, "data.args": data.args, "data.root": root}
    return values
