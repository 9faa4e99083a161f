"""The attempts of a run, in ``environment.json``: what each ran on, from which step, and how it ended."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import accelerate
import torch

import digitdist
from digitdist.checkpoint import atomic_write
from digitdist.distributed import Plan, describe_instructions, device_name, read_beats
from digitdist.errors import Fault, Stopped
from digitdist.runs.folder import ENVIRONMENT
from digitdist.world import restart_count

Attempt = dict[str, Any]
KEY = "starts"  # of the list in the file, whose format is kept


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts of a run, oldest first."""
    try:
        return json.loads((folder / ENVIRONMENT).read_text())[KEY]
    except FileNotFoundError:
        return []


def write_attempts(folder: Path, attempts: list[Attempt]) -> None:
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
        beats = read_beats(file.read_bytes())
        if attempts and beats:
            furthest = max(beats, key=lambda beat: beat.step)
            attempts[-1] |= {"reached": furthest.step}
            if "stopped" not in attempts[-1]:
                attempts[-1].setdefault("fault", f"rank {furthest.rank} ended without a word at {furthest.position}")
        file.unlink()


def check_progress(folder: Path, attempts: list[Attempt], launchers: list[float], world_size: int) -> None:
    """Ends restarts by a launcher that are in vain. `launchers`: start times of those that started the ranks.

    Raises:
        Stopped: the last attempt was asked to stop, and not because the launcher has found more hosts since.
        Fault: the launcher has restarted its workers twice without a step of progress.
    """
    own = started_by(attempts, launchers)
    if own and own[-1].get("stopped") and world_size <= own[-1]["world_size"]:
        raise Stopped(f"{folder}: stopped on request; the launcher's restart does not change that")
    failed = [attempt for attempt in own if not attempt.get("stopped")]
    reached = [attempt.get("reached", 0) for attempt in failed]
    if len(reached) > 2 and max(reached[-2:]) <= max(reached[:-2]):
        raise Fault(f"{folder}: restarted twice without a step of progress; the cause: {failed[-1]['fault']}")


def started_by(attempts: list[Attempt], launchers: list[float]) -> list[Attempt]:
    return [attempt for attempt in attempts if set(attempt.get("launchers", ())) & set(launchers)]


def run_of_launchers(runs: Path, launchers: list[float]) -> str | None:
    """The name of the newest run that one of these launchers has started before, and so restarts; None without one."""
    folders = [file.parent for file in runs.glob(f"*/{ENVIRONMENT}")]
    if not restart_count():  # a program that launches may start several runs, one after another
        folders = [folder for folder in folders if not (folder / "result.json").exists()]
    return max((folder.name for folder in folders if started_by(read_attempts(folder)[-1:], launchers)), default=None)


def describe_environment(plan: Plan) -> Attempt:
    """What this attempt runs on."""
    git = ["git", "-C", str(Path(digitdist.__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
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
        "git_commit": commit.stdout.strip() if commit and commit.returncode == 0 else None,
        "command": sys.argv,
    }
