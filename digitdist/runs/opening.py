"""Opening a run's folder for an attempt: its name, its lock, and what is resumed."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from digitdist.checkpoint import Checkpoint, DamagedCheckpoint, atomic_write, newest_good, read
from digitdist.config import Config, as_dict, dump_config, result_changes
from digitdist.data import Splits
from digitdist.distributed import Plan
from digitdist.errors import UserError
from digitdist.runs.attempts import (
    check_progress,
    describe_environment,
    read_attempts,
    run_of_launchers,
    take_in_heartbeats,
    write_attempts,
)
from digitdist.runs.folder import DATA_SET, ENVIRONMENT, PREDICTIONS, RESULT, Run
from digitdist.runs.metrics import METRICS, truncate_metrics
from digitdist.runs.origin import mark_run
from digitdist.world import print_main

RUN_FILES = (METRICS, RESULT, PREDICTIONS, ENVIRONMENT, DATA_SET, "trace.json")


def open_run(config: Config, plan: Plan, splits: Splits, last_step: int, launchers: list[float]) -> Run:
    """Opens the run's folder on the main rank: locks it, finds what to resume, truncates the metrics to it.

    `launchers` are the start times of the launchers of all ranks, by which restarted workers find their run.

    Raises:
        UserError: another training works in the folder, or the run cannot be resumed with this configuration.
        Stopped, Fault: a launcher has restarted the run in vain.
    """
    runs = Path(config.run.dir)
    folder = runs / (config.run.name or run_of_launchers(runs, launchers) or _name_from_time(runs))
    run = Run(folder, platform.node(), token=secrets.token_hex(8), lock=_lock(folder))
    try:
        _resume_or_begin(run, config, plan, splits, last_step, launchers)
    except BaseException:
        run.close()
        raise
    return run


def _resume_or_begin(run: Run, config: Config, plan: Plan, splits: Splits, last_step: int, launchers: list[float]) -> None:
    folder = run.folder
    if config.checkpoint.resume == "never":
        _clear(folder)
    run.stored = _find_checkpoint(run, config.checkpoint.resume)
    if run.stored:
        _check_unchanged(config, plan, splits, run.stored)
        run.finished = run.stored.step >= last_step and (folder / RESULT).is_file()
        if run.finished:
            return
        for name in (RESULT, PREDICTIONS):  # of an end that is now passed
            (folder / name).unlink(missing_ok=True)
    _begin_attempt(run, plan, launchers)
    config.run.name = folder.name
    atomic_write(folder / "config.yaml", dump_config(config))
    atomic_write(folder / DATA_SET, splits.info.to_json().encode() + b"\n")
    mark_run(folder)


def _begin_attempt(run: Run, plan: Plan, launchers: list[float]) -> None:
    attempts = read_attempts(run.folder)
    take_in_heartbeats(run.folder, attempts)
    write_attempts(run.folder, attempts)
    check_progress(run.folder, attempts, launchers, plan.world.size)
    run.wandb_id = attempts[0]["wandb_id"] if attempts else os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
    step = run.stored.step if run.stored else 0
    truncate_metrics(run.folder, step if run.stored else -1)
    own = {"step": step, "wandb_id": run.wandb_id, "launchers": launchers}
    write_attempts(run.folder, [*attempts, describe_environment(plan) | own])
    (run.folder / run.heartbeat_name).touch()


def _lock(folder: Path) -> FileLock:
    """The lock of a run's folder, which is made; it ends with this process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=1)
    except Timeout:
        raise UserError(f"{folder}: another training works in this run; wait for it, or give another run.name") from None
    except OSError as error:
        raise UserError(f"run.dir: {error.filename}: {error.strerror}; give a folder you can write to") from None
    return lock


def _name_from_time(runs: Path) -> str:
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1000))) if not (runs / n).exists())


def _clear(folder: Path) -> None:
    """Removes what an earlier training has left in the folder of a run that starts over."""
    for name in ("checkpoints", "wandb", "plots"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def _find_checkpoint(run: Run, resume: str) -> Checkpoint | None:
    """The newest good checkpoint of the run, else the one that `checkpoint.resume` names: a folder, or a run's."""
    stored = newest_good(run.checkpoints, print_main)
    if stored or resume in ("auto", "never"):
        return stored
    path = Path(resume)
    try:
        return newest_good(path / "checkpoints", print_main) or read(path)
    except DamagedCheckpoint as damage:
        raise UserError(f"checkpoint.resume={path}: {damage}; give auto, never or a good checkpoint's folder") from None


def _check_unchanged(config: Config, plan: Plan, splits: Splits, stored: Checkpoint) -> None:
    """Refuses to resume with a configuration or images that give another result than the one the run began with."""
    # What alters the result is the effective precision: `auto` may now be another one, or the same be asked for by its name.
    before = stored.state["config"] | {"train.precision": stored.state["precision"]}
    differences = result_changes(before, as_dict(config) | {"train.precision": plan.precision})
    if stored.state.get("data_sha256", splits.sha256) != splits.sha256:  # runs of version 0.1 have none
        differences.append(f"the images of {splits.info.name} are not those that the run began with")
    if differences and not config.checkpoint.allow_change:
        advice = "set it back, give another run.name, or set checkpoint.allow_change=true"
        raise UserError(*(f"{stored.folder}: {difference}; {advice}" for difference in differences))
