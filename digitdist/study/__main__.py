"""The command ``python -m digitdist.study``: the same training over many seeds, or over a grid of values.

python -m digitdist.study NAME --seeds N [--jobs J] [--config FILE] [key=value ...]
python -m digitdist.study NAME --seeds N --against OTHER
python -m digitdist.study NAME --seeds N --grid optim.lr=0.001,0.002 data.validation=5000
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from digitdist.config import Parser, load_config
from digitdist.distributed import StopRequest, make_expendable, run_command
from digitdist.errors import RunsFailed, Stopped, UserError
from digitdist.report import Study, as_study, read_study, summary, write_study_report
from digitdist.runs import CONFIG, find_run_or_study, is_override, seeds_in
from digitdist.study.grid import check_held_out, combinations, is_axis
from digitdist.study.planning import Training, plan_study
from digitdist.study.progress import Progress
from digitdist.study.running import Outcome, train_all
from digitdist.study.slots import make_slots
from digitdist.study.table import against, grid_summary, study_table
from digitdist.world import read_world

MAX_RUNS = 100_000


def main() -> None:
    """The command."""
    make_expendable("stdout")  # its runs are not to end with it
    arguments = _arguments()
    if read_world().size > 1:
        raise UserError("a study starts its processes by itself; start it once, by python -m digitdist.study")
    runs_dir, folder = _place(arguments)
    if arguments.seeds is None and not arguments.grid:
        find_run_or_study(str(folder), runs_dir)  # or what is there is told
    studies = combinations(arguments.grid, folder) if arguments.grid else {folder: []}
    if arguments.grid and (seeds_in(folder) or (folder / CONFIG).is_file()):
        raise UserError(f"{folder} is a study or a run, in which no grid has room; give another NAME")
    others = _others(arguments.against, runs_dir, folder)
    outcome = Outcome()
    if arguments.seeds is not None:
        outcome = _train(arguments, folder.name, studies)
    try:
        if not arguments.part:
            _show(arguments, folder.name, list(studies), others)
    except UserError:
        if not outcome.failures:  # which may have left nothing to show
            raise
    if outcome.failures:
        for run, reason in outcome.failures.items():
            print(f"error: {run} failed: {reason}", file=sys.stderr)
        raise RunsFailed
    if arguments.part and not arguments.json:
        print(f"part {arguments.part} is done; the same command without --part collects all parts", flush=True)


def _arguments() -> argparse.Namespace:
    parser = Parser(
        "python -m digitdist.study",
        "The same training over seeds 0 to N-1, as runs NAME/seed-K: mean, interval, and whether it differs from others.",
        "mine --seeds 3 --config quick train.epochs=0.1",
    )
    parser.add_argument("name", metavar="NAME", help="the study's folder, or its name in run.dir")
    parser.add_config()
    parser.add_argument("--seeds", type=int, metavar="N", help="train seeds 0 to N-1; without it, what is there is shown")
    parser.add_argument("--jobs", type=int, metavar="J", help="runs at a time (default: one a GPU; without GPUs one a core)")
    several: dict[str, Any] = {"nargs": "+", "default": []}
    parser.add_argument(
        "--against", action="append", metavar="OTHER", help="studies to compare with, or runs that are one together", **several
    )
    parser.add_argument(
        "--grid",
        action="extend",
        metavar="key=value,value",
        help="a study of each combination, chosen by held-out images",
        **several,
    )
    parser.add_argument("--part", metavar="I/M", help="train every M-th run alone, from the I-th on, counted from 0; no table")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments = parser.parse_args()
    for option in ("seeds", "jobs"):
        number = getattr(arguments, option)
        if number is not None and not 1 <= number <= MAX_RUNS:
            raise UserError(f"--{option} {number} is not allowed; it takes a whole number from 1 to {MAX_RUNS:,}")
    # Options that take several words take what follows them too.
    arguments.overrides += [word for words in arguments.against for word in words if is_override(word)]
    arguments.against = [[word for word in words if not is_override(word)] for words in arguments.against]
    is_grid = bool(arguments.grid)
    arguments.overrides += [word for word in arguments.grid if not is_axis(word)]
    arguments.grid = [word for word in arguments.grid if is_axis(word)]
    if is_grid and not arguments.grid:
        parser.error("--grid has no key with several values; write for example --grid optim.lr=0.001,0.002")
    if arguments.grid and arguments.against:
        parser.error("--against is not allowed with --grid, which compares its own studies; compare the chosen one afterwards")
    if arguments.part is not None and arguments.seeds is None:
        parser.error("--part is of the runs that --seeds N trains; give both")
    return arguments


def _place(arguments: argparse.Namespace) -> tuple[str, Path]:
    """The folder of all runs, and that of the study: one of this name in it, else the path that the name is."""
    arguments.name = arguments.name.rstrip("/")
    plain = os.path.basename(arguments.name)
    runs_dir = load_config(arguments.config, [*arguments.overrides, f"run.name={plain}"]).run.dir
    named = Path(runs_dir) / arguments.name
    is_path = plain != arguments.name and not named.is_dir()
    return runs_dir, Path(os.path.expanduser(arguments.name)) if is_path else named


def _others(groups: Sequence[Sequence[str]], runs_dir: str, own: Path) -> list[Study]:
    """What ``--against`` names: each study, and the runs of each group together; none of them of the study in `own`."""
    found = []
    for names in groups:
        folders = [(name, find_run_or_study(name, runs_dir)) for name in names]
        _check_independent([folder.resolve() for _, folder in folders], own.resolve())
        runs = [(name, folder) for name, folder in folders if (folder / CONFIG).is_file()]
        found += [read_study(folder, name) for name, folder in folders if (name, folder) not in runs]
        if runs:
            found.append(as_study([folder for _, folder in runs], ", ".join(name for name, _ in runs)))
    lacking = [study.name for study in found if not study.records]
    if lacking:
        raise UserError(f"--against {lacking[0]}: no run of it is finished; go on with it first")
    return found


def _check_independent(folders: Sequence[Path], own: Path) -> None:
    """Refuses runs that would count double, or on both sides, since Welch's interval is one of independent runs."""
    for number, folder in enumerate(folders):
        if own in (folder, folder.parent):
            raise UserError(f"--against {folder} is not allowed: it is of the study itself; give other runs")
        if folder in folders[:number] or folder.parent in folders:
            raise UserError(f"--against {folder} is there twice, and would count double; give each run once")


def _train(arguments: argparse.Namespace, name: str, studies: dict[Path, list[str]]) -> Outcome:
    """Trains what is not done yet of this command's part of all runs.

    Raises:
        Stopped: on request.
        UserError: a mistake that is that of all runs.
    """
    planned = []
    for folder, own in studies.items():
        planned.append(plan_study(folder, arguments.seeds, arguments.config, [*arguments.overrides, *own], name))
        if arguments.grid:
            check_held_out(planned[-1][0].config)
    trainings = _part([training for same_seed in zip(*planned, strict=True) for training in same_seed], arguments.part)
    waiting = [training for training in trainings if not training.is_done]
    if not waiting:
        return Outcome()
    slots = make_slots(arguments.jobs, waiting[0].config, len(trainings))
    stream = sys.stderr if arguments.json else sys.stdout
    done = len(trainings) - len(waiting)
    stop = StopRequest()
    stop.listen()
    progress = Progress(name, len(trainings), done, stream)
    threads = f", threads {slots[0].threads} each" if slots[0].threads else ""
    progress.print(f"{name}: {len(trainings)} runs, {done} of them done, {len(slots)} at a time{threads}")
    stop.report = progress.print
    outcome = train_all(waiting, slots, progress, stop)
    stop.close()
    for number in (signal.SIGINT, signal.SIGTERM):  # from here on they end this process at once, as before
        signal.signal(number, signal.SIG_DFL)
    if outcome.stopped:
        left = f"{len(trainings) - done - len(outcome.seconds)} of {len(trainings)} runs are left"
        raise Stopped(f"stopped on request, {left}; to go on: {shlex.join(sys.orig_argv)}")
    return outcome


def _part(trainings: list[Training], part: str | None) -> list[Training]:
    """Of all runs, in the order of their seeds, those of one part, such as 0/4."""
    if part is None:
        return trainings
    first, slash, count = part.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f"--part {part} is not allowed; it takes I/M, such as 0/4, 1/4, 2/4 and 3/4")
    return trainings[int(first) :: int(count)]


def _show(arguments: argparse.Namespace, name: str, folders: Sequence[Path], others: Sequence[Study]) -> None:
    """Prints what has been found, and writes the page of the study, or of the one that is chosen of a grid."""
    studies = [read_study(folder) for folder in folders]
    by_name = {study.name: folder for study, folder in zip(studies, folders, strict=True)}
    if arguments.grid:
        lines, values = grid_summary(name, studies)
        chosen = by_name[values["chosen"]]
    else:
        (study,), (chosen,) = studies, folders
        if not study.records:
            raise UserError(f"{chosen}: no run of it is finished; give --seeds N to train them")
        words, found = against(study, others)
        lines, values = [study_table([study, *others]), *words], summary(study) | {"against": found}
    lines += [f"note: {note}" for study in (*studies, *others) for note in study.notes]
    config = load_config(arguments.config, arguments.overrides)
    if config.run.report:
        lines.append(_page(chosen))
    print(json.dumps(values) if arguments.json else "\n".join(lines), flush=True)


def _page(folder: Path) -> str:
    """Writes the page of a study; a line about it."""
    try:
        return f"report in {write_study_report(folder)}"
    except OSError as error:
        return f"no report: {error.filename or folder}: {error.strerror}; later: python -m digitdist.report {folder}"


if __name__ == "__main__":
    run_command(main)
