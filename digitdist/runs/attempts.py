"""The attempts of a run, in ``environment.json``: what each ran on, from which step, and how it ended."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import accelerate
import torch

import digitdist
from digitdist.distributed import Plan, describe_instructions, device_name, read_beats
from digitdist.errors import Fault, Stopped
from digitdist.files import atomic_write, parse_json, read_plain, remove
from digitdist.runs.folder import ENVIRONMENT, RESULT
from digitdist.runs.wandb_settings import BAD_IN_RUN_ID
from digitdist.world import restart_count

Attempt = dict[str, Any]
KEY = "starts"  # of the list in the file, whose format is kept
OPTIONAL: dict[str, type | tuple[type, ...]] = {
    "launchers": list,
    "slurm": list,
    "training": str,
    "reached": int,
    "stopped": bool,
    "fault": str,
}


def read_attempts(folder: Path, report: Callable[[str], None] = lambda _: None) -> list[Attempt]:
    """The attempts of a run, oldest first; `report` gets a line where some of them are lost."""
    file = folder / ENVIRONMENT
    try:
        found = parse_json(read_plain(file))[KEY]
        attempts = [attempt for attempt in found if _is_attempt(attempt)]
        lost = len(found) - len(attempts)
        why = f"{lost} of {len(found)} earlier attempts are lost" if lost else ""
    except FileNotFoundError:
        return []
    except OSError as error:
        attempts, why = [], f"{error.strerror}; earlier attempts are lost"
    except (ValueError, KeyError, TypeError):
        attempts, why = [], "it holds no list of attempts; earlier ones are lost"
    if why:
        report(f"{file} is damaged: {why}")
    return attempts


def _is_attempt(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(type(value.get(name)) is int and value[name] >= 0 for name in ("step", "world_size"))
        and isinstance(value.get("wandb_id"), str)
        and not set(value["wandb_id"]) & (BAD_IN_RUN_ID | {" ", "\n"})
        and all(isinstance(value[name], kind) for name, kind in OPTIONAL.items() if name in value)
        and all(isinstance(item, (int, float, str)) for name in ("launchers", "slurm") for item in value.get(name, ()))
    )


def write_attempts(folder: Path, attempts: list[Attempt]) -> None:
    """Writes the attempts of a run.

    Raises:
        OSError: the disk is full, or writing fails.
    """
    atomic_write(folder / ENVIRONMENT, json.dumps({KEY: attempts}, indent=1).encode() + b"\n")


def record_end(folder: Path, **how: Any) -> None:
    """Records how the last attempt of a run ended: ``stopped=True`` or ``fault="…"``; the first fault counts.

    A file that cannot be written, as on a full disk, is one line: it must not hide how the run has ended.
    """
    try:
        attempts = read_attempts(folder)
        if attempts and not ("fault" in how and "fault" in attempts[-1]):
            attempts[-1] |= how
            write_attempts(folder, attempts)
    except OSError as error:
        print(f"{folder / ENVIRONMENT}: how this attempt ended is not recorded ({error.strerror})", file=sys.stderr, flush=True)


def take_in_heartbeats(folder: Path, attempts: list[Attempt]) -> None:
    """Adds to the last attempt the step that its ranks had reached, from their heartbeats, which are then removed."""
    for file in folder.glob(".heartbeat-*"):
        try:
            beats = read_beats(read_plain(file))
        except OSError:
            beats = []
        if attempts and beats:
            furthest = max(beats, key=lambda beat: beat.step)
            attempts[-1] |= {"reached": furthest.step}
            if "stopped" not in attempts[-1]:
                attempts[-1].setdefault("fault", f"rank {furthest.rank} ended without a word at {furthest.position}")
        remove(file)


def check_progress(folder: Path, attempts: list[Attempt], launchers: list[float], world_size: int) -> None:
    """Ends restarts by a launcher that are in vain. `launchers`: start times of those that started the ranks.

    Raises:
        Stopped: the last attempt was asked to stop, and not because the launcher has found more hosts since.
        Fault: the launcher has restarted its workers twice without a step of progress.
    """
    own = started_by(attempts, launchers)
    if own and own[-1].get("stopped") and world_size <= own[-1]["world_size"]:
        raise Stopped(f"{folder}: stopped on request; the launcher's restart does not change that", final=True)
    failed = [attempt for attempt in own if not attempt.get("stopped")]
    reached = [attempt.get("reached", 0) for attempt in failed]
    if len(reached) > 2 and max(reached[-2:]) <= max(reached[:-2]):
        raise Fault(f"{folder}: restarted twice without a step of progress; the cause: {failed[-1].get('fault', 'not known')}")


def started_by(attempts: list[Attempt], launchers: list[float]) -> list[Attempt]:
    return [attempt for attempt in attempts if set(attempt.get("launchers", ())) & set(launchers)]


def is_restart(folder: Path, launchers: list[float]) -> bool:
    """Whether the launcher or Slurm, which has started the last attempt of the run, starts the same training once more."""
    last, slurm = read_attempts(folder)[-1:], slurm_start()
    if not last:  # where the record is damaged, what is there is kept
        return os.path.lexists(folder / ENVIRONMENT) and (restart_count() > 0 or slurm[1:] not in ([], ["0"]))
    if started_by(last, launchers):  # a program that launches may start one after another
        return restart_count() > 0 or not (folder / RESULT).exists()
    before = last[0].get("slurm", [])
    return bool(slurm) and before[:1] == slurm[:1] and before != slurm


def slurm_start() -> list[str]:
    """The job of Slurm's in which this process runs, and how often Slurm has restarted it; empty outside of Slurm."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else []


def run_of_launchers(runs: Path, launchers: list[float]) -> str | None:
    """The name of the newest run that one of these launchers has started before, and so restarts; None without one."""
    folders = [file.parent for file in runs.glob(f"*/{ENVIRONMENT}")] if launchers else []
    own = [folder for folder in folders if started_by(read_attempts(folder)[-1:], launchers)]
    return max((folder.name for folder in own if is_restart(folder, launchers)), default=None)


def describe_environment(plan: Plan) -> Attempt:
    """What this attempt runs on."""
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "device": plan.device_type,
        "device_name": device_name(plan.device_type),
        "cpu_instructions": describe_instructions(),
        "world_size": plan.world.size,
        "precision": plan.precision,
        "threads": plan.threads,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "digitdist": digitdist.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "git_commit": git_commit(Path(digitdist.__file__)),
        "command": sys.argv,
    }


def git_commit(source: Path) -> str | None:
    """The commit that `source`, a file of the package, is of; None where git does not track it, as in a folder of packages that
    lies in somebody's repository."""
    if not shutil.which("git"):
        return None
    git = ["git", "-C", str(source.parent)]
    for command in (["ls-files", "--error-unmatch", source.name], ["rev-parse", "HEAD"]):
        done = subprocess.run([*git, *command], capture_output=True, text=True)
        if done.returncode:
            return None
    return done.stdout.strip()
