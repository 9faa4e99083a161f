"""Real launches for the tests: the command as a person types it, with the files of its run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
QUIET = ("tracking.wandb=disabled", "run.report=false")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_", "SLURM_", "OMP_"))}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines that tell a mistake of the user's."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def python(*arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 100) -> Outcome:
    return run([sys.executable, *arguments], cwd=cwd, env=env, timeout=timeout)


def torchrun(processes: int, *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 100) -> Outcome:
    command = [str(BIN / "torchrun"), "--nproc_per_node", str(processes), *arguments]
    return run(command, cwd=cwd, env=env, timeout=timeout)


def accelerate(*arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 100) -> Outcome:
    return run([str(BIN / "accelerate"), "launch", *arguments], cwd=cwd, env=env, timeout=timeout)


def run(command: list[str], cwd: Path, env: dict[str, str] | None, timeout: float) -> Outcome:
    done = subprocess.run(command, cwd=cwd, env=CLEAN | (env or {}), capture_output=True, text=True, timeout=timeout)
    return Outcome(done.returncode, done.stdout, done.stderr)


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def only_run(cwd: Path) -> Path:
    """The one run folder that a launch has left."""
    (folder,) = (cwd / "runs").iterdir()
    return folder


def events(folder: Path) -> list[dict]:
    """The metric lines of a run, without what differs between two runs that are the same: wall time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    differs = ("time", "train/images_per_second")
    return [{k: v for k, v in line.items() if k not in differs and not k.startswith("time/")} for line in lines]
