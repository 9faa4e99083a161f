"""Opening a run's folder for an attempt: its name, its lock, and what is resumed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shlex
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from digitdist.checkpoint import Checkpoint, DamagedCheckpoint, UnreadableCheckpoint, newest_good, read
from digitdist.config import KEYS, Config, as_dict, dump_config, load_stored_config, result_changes
from digitdist.data import Splits
from digitdist.distributed import Plan, heartbeat_size
from digitdist.errors import UserError, in_one_line
from digitdist.files import atomic_write, remove
from digitdist.runs.attempts import (
    Attempt,
    check_progress,
    describe_environment,
    is_restart,
    read_attempts,
    run_of_launchers,
    slurm_start,
    take_in_heartbeats,
    write_attempts,
)
from digitdist.runs.clearing import begin_anew, move_aside, remove_temporary, set_aside
from digitdist.runs.finding import read_info
from digitdist.runs.finished import is_finished
from digitdist.runs.folder import CONFIG, DATA_SET, LOCK, PREDICTIONS, RESULT, Run
from digitdist.runs.metrics import truncate_metrics
from digitdist.runs.origin import mark_run
from digitdist.runs.studies import holds_runs
from digitdist.world import print_main

PLACES = ("run.dir", "run.name", "checkpoint.resume")  # where a run was trained and began; it may lie elsewhere now
CHANGE_ADVICE = "set it back, give another run.name, or set checkpoint.allow_change=true"
OF_A_STATE: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "precision": str,
    "train_seconds": (int, float),
    "best": (dict, type(None)),
}
Fit = Callable[[Checkpoint], tuple[Checkpoint, list[str]]]
Ending = Callable[[int, dict[str, Any] | None], str | None]  # by what a training ends at a step with that best evaluation


def keep_all(stored: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Takes a checkpoint as it is."""
    return stored, []


def open_run(config: Config, plan: Plan, splits: Splits, ending: Ending, launchers: list[float], fit: Fit = keep_all) -> Run:
    """Opens the run's folder on the main rank: locks it, finds what to resume, truncates the metrics to it.

    `ending` says of a step and the best evaluation until then by what the training ends there, None where it goes on.
    `launchers` are the start times of the launchers of all ranks, by which restarted workers find their run. `fit` gives what
    of a checkpoint is resumed, and lines about what is not, before a file of the run is touched.

    Raises:
        UserError: another training works in the folder, it cannot be written, or the run cannot be resumed with this
            configuration; a folder that was not there before is not there then either.
        Stopped, Fault: a launcher has restarted the run in vain.
    """
    runs = Path(config.run.dir)
    name = config.run.name or run_of_launchers(runs, launchers)
    is_new, lock, folder = not name or not (runs / name).exists(), None, runs
    try:
        folder = runs / name if name else _make_folder_named_by_time(runs)
        if not (folder / CONFIG).is_file() and holds_runs(folder):
            raise UserError(f"{folder} is a study, a folder of runs; give another run.name")
        lock = _lock(folder)
        run = Run(folder, platform.node(), token=secrets.token_hex(8), lock=lock)
        _resume_or_begin(run, config, plan, splits, ending, launchers, fit)
        return run
    except BaseException as error:
        if lock:  # or the folder may by now be another training's
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()
        if isinstance(error, OSError):
            what = f"{error.filename or folder}: {error.strerror or error}"
            raise UserError(f"run.dir={runs}: {what}; make room or give permission there, or give another run.dir") from None
        raise


def _make_folder_named_by_time(runs: Path) -> Path:
    runs.mkdir(parents=True, exist_ok=True)
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    for folder in (runs / name, *(runs / f"{name}-{i}" for i in range(2, 1000))):
        try:
            folder.mkdir()
            return folder
        except FileExistsError:  # a training that was started in the same second
            continue
    raise FileExistsError(f"{runs / name}-999")


def _lock(folder: Path) -> FileLock:
    """The lock of a run's folder, which is made; it ends with this process."""
    folder.mkdir(parents=True, exist_ok=True)
    move_aside(folder, [LOCK])
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        raise UserError(f"{folder}: another training works in this run; wait for it, or give another run.name") from None
    return lock


def _resume_or_begin(
    run: Run, config: Config, plan: Plan, splits: Splits, ending: Ending, launchers: list[float], fit: Fit
) -> None:
    """Everything that can be refused is refused before a file is touched."""
    folder, training = run.folder, _training_id(config, plan, splits)
    restarted = is_restart(folder, launchers)
    never = config.checkpoint.resume == "never" and not restarted  # it acts once a launch
    run.stored = None if never else _find_checkpoint(run, config.checkpoint.resume)
    if run.stored:
        _check_unchanged(config, plan, splits, run.stored)
        ended = ending(run.stored.step, run.stored.state["best"])
        run.finished = ended is not None and _is_own(run) and is_finished(folder, run.stored, print_main)
        run.stored, lines = (run.stored, []) if run.finished else fit(run.stored)
        for line in lines:
            print_main(line)
    move_aside(folder)
    remove_temporary(folder)
    config.run.name = folder.name
    attempts = read_attempts(folder, print_main)
    take_in_heartbeats(folder, attempts)
    if attempts and not restarted and run.stop_file.exists():
        print_main(f"{run.stop_file} was left by an earlier attempt, and is removed; to stop the run, make it again")
        remove(run.stop_file)
    if run.finished:
        _mend_configuration(run, config, splits)
        return
    is_same = not never and attempts and attempts[-1].get("training") == training
    if _is_own(run) if run.stored else is_same:
        _continue(run)
    else:
        begin_anew(folder, with_checkpoints=never)
        attempts = []
    _begin_attempt(run, plan, attempts, launchers, training)
    auto = " and checkpoint.resume=auto" if config.checkpoint.resume == "never" else ""
    run.resuming = f"run the same command again with {shlex.quote(f'run.name={folder.name}')}{auto}"
    _write_configuration(folder, config, splits)


def _write_configuration(folder: Path, config: Config, splits: Splits) -> None:
    atomic_write(folder / CONFIG, dump_config(config))
    atomic_write(folder / DATA_SET, splits.info.to_json().encode() + b"\n")
    mark_run(folder)


def _mend_configuration(run: Run, config: Config, splits: Splits) -> None:
    """Writes again how a finished run was trained, where that is damaged, missing or not what its last checkpoint says."""
    try:
        said = load_stored_config(run.folder / CONFIG)
        read_info(run.folder, said.data)
        trained = run.stored.state["config"] if run.stored else {}
        differing = [name for name, value in as_dict(said).items() if name not in PLACES and trained.get(name, value) != value]
        damage = ", ".join(differing)
    except UserError as error:
        damage = in_one_line(error)
    if damage:
        print_main(f"{run.folder}: config.yaml and {DATA_SET} are damaged, and are made again ({damage})")
        _write_configuration(run.folder, config, splits)


def _is_own(run: Run) -> bool:
    """Whether what is resumed is a checkpoint of the run itself."""
    return bool(run.stored and run.stored.folder and run.stored.folder.parent.resolve() == run.checkpoints.resolve())


def _continue(run: Run) -> None:
    """Removes what the training that is resumed is to make again."""
    step = run.stored.step if run.stored else -1
    set_aside(run.checkpoints, after=step)
    truncate_metrics(run.folder, step, print_main)
    for name in (RESULT, PREDICTIONS):  # of an end that is now passed
        remove(run.folder / name)


def _begin_attempt(run: Run, plan: Plan, attempts: list[Attempt], launchers: list[float], training: str) -> None:
    write_attempts(run.folder, attempts)
    check_progress(run.folder, attempts, launchers, plan.world.size)
    run.wandb_id = attempts[0]["wandb_id"] if attempts else os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    step = run.stored.step if run.stored else 0
    own = {"step": step, "wandb_id": run.wandb_id, "launchers": launchers, "slurm": slurm_start(), "training": training}
    write_attempts(run.folder, [*attempts, describe_environment(plan) | own])
    # Whole, since to write to a page of memory for which the disk has no room ends a process.
    (run.folder / run.heartbeat_name).write_bytes(bytes(heartbeat_size(plan.world)))


def _find_checkpoint(run: Run, resume: str) -> Checkpoint | None:
    """What is resumed: the newest good checkpoint of the run, unless `resume` names a folder, a run's or a checkpoint's, from
    which that one does not come.

    Raises:
        UserError: there is no good checkpoint in that folder, or those of the run cannot be read at this moment.
    """
    try:
        own = newest_good(run.checkpoints, print_main)
    except UnreadableCheckpoint as damage:
        raise UserError(f"{damage}; make it readable, or set checkpoint.resume=never to start over") from None
    if resume in ("auto", "never"):
        return own
    path = Path(resume)
    if own and _is_same(own.state.get("config", {}).get("checkpoint.resume"), path):
        return own  # this very command has begun from there, and come further
    try:
        return newest_good(path / "checkpoints", print_main) or read(path)
    except DamagedCheckpoint as damage:
        raise UserError(f"checkpoint.resume={path}: {damage}; give auto, never or a good checkpoint's folder") from None


def _is_same(resumed: object, path: Path) -> bool:
    """Whether the value that `checkpoint.resume` had is this folder."""
    return isinstance(resumed, str) and Path(resumed).resolve() == path.resolve()


def _check_unchanged(config: Config, plan: Plan, splits: Splits, stored: Checkpoint) -> None:
    """Refuses to resume with a configuration or images that give another result than the one the run began with."""
    _check_state(stored)
    # What alters the result is the effective precision: `auto` may now be another one, or the same be asked for by its name.
    before = stored.state["config"] | {"train.precision": stored.state["precision"]}
    differences = result_changes(before, as_dict(config) | {"train.precision": plan.precision})
    if stored.state.get("data_sha256", splits.sha256) != splits.sha256:  # runs of version 0.1 have none
        differences.append(f"the images of {splits.info.name} are not those that the run began with")
    if differences and not config.checkpoint.allow_change:
        raise UserError(*(f"{stored.folder}: {difference}; {CHANGE_ADVICE}" for difference in differences))


def _check_state(stored: Checkpoint) -> None:
    """Refuses a checkpoint, which somebody else may have made, without what a training goes on from."""
    state = stored.state
    wrong = [name for name, kind in OF_A_STATE.items() if name not in state or not isinstance(state[name], kind)]
    if not wrong:
        wrong = [f"config, {name}" for name in ("train.epochs", "sync.mode") if name not in state["config"]]
        best = state["best"] or {"step": 0, "accuracy": 0.0}
        wrong += ["best"] if [type(best.get(name)) for name in ("step", "accuracy")] != [int, float] else []
    if wrong:
        advice = "give another checkpoint.resume, or never to start over"
        raise UserError(f"{stored.folder}: its state lacks {'; '.join(wrong)}, so that no training goes on from it; {advice}")


def _training_id(config: Config, plan: Plan, splits: Splits) -> str:
    """The same for two trainings that end at the same weights: by configuration, effective precision and data."""
    values = {name: value for name, value in as_dict(config).items() if KEYS[name].alters_result_in(config.sync.mode)}
    values |= {"train.precision": plan.precision, "data": splits.sha256}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
