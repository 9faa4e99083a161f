"""Real launches: the command as a person types it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
QUIET = ("tracking.wandb=disabled", "run.report=false")
# What hides a machine's GPUs from a process: CUDA's and ROCm's, and Intel's, to which an empty text would mean all of them.
HIDING = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "ZE_AFFINITY_MASK": "999"}
SHOWN = {name: os.environ[name] for name in HIDING if name in os.environ}  # which a user wants seen
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "ACCELERATE_", "SLURM_", "OMP_"))} | HIDING
if sys.platform == "darwin":  # where nothing hides the GPU
    CLEAN["ACCELERATE_USE_CPU"] = "true"
STATE = tempfile.TemporaryDirectory(prefix="digitdist-state-")  # by whose secret a run is known to be made here
CLEAN["XDG_STATE_HOME"] = STATE.name
CLEAN["GOMP_SPINCOUNT"] = "0"  # threads that spin while they wait slow each other 20 times on a busy machine


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines that report a mistake of the user's."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]


def python(*arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 100) -> Outcome:
    return run([sys.executable, *arguments], cwd=cwd, env=env, timeout=timeout)


def torchrun(processes: int, *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 100) -> Outcome:
    command = [str(BIN / "torchrun"), "--nproc_per_node", str(processes), *arguments]
    return run(command, cwd=cwd, env=env, timeout=timeout)


def worlds(
    sizes: Sequence[int], module: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 100
) -> dict[int, Outcome]:
    """Runs a worker of tests on a world of each size, without a launcher: see `helpers.ranks`."""
    own = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}  # as torchrun sets it
    with tempfile.TemporaryDirectory() as streams:
        command = ("-m", "helpers.ranks", streams, ",".join(map(str, sizes)), module, *arguments)
        done = python(*command, cwd=cwd, env=own | (env or {}), timeout=timeout)
        printed = {size: [(Path(streams) / f"{size}.{name}") for name in ("out", "err")] for size in sizes}
        texts = {size: [file.read_text() if file.exists() else "" for file in files] for size, files in printed.items()}
    assert done.code == 0, (done.err, texts)
    return {size: Outcome(done.code, *texts[size]) for size in sizes}


def accelerate(*arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 100) -> Outcome:
    return run([str(BIN / "accelerate"), "launch", *arguments], cwd=cwd, env=env, timeout=timeout)


def run(command: list[str], cwd: Path, env: dict[str, str] | None, timeout: float) -> Outcome:
    return run_in(CLEAN | (env or {}), command, cwd, timeout)


def run_in(environment: dict[str, str], command: list[str], cwd: Path, timeout: float) -> Outcome:
    """Runs a command to its end in this environment and no other, as one must that may use GPUs."""
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    return Outcome(done.returncode, done.stdout, done.stderr)


def start_process(command: list[str], cwd: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    """Starts a command in a process group of its own; its errors are among its output."""
    streams: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, start_new_session=True, **streams)


def on_a_terminal(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output of a Python command that has a terminal on which nobody types."""
    main, secondary = pty.openpty()
    streams = {"stdin": secondary, "stdout": secondary, "stderr": secondary}
    environment = CLEAN | {"COLUMNS": "200"} | (env or {})
    process = subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=environment, **streams)
    os.close(secondary)
    shown = b""
    try:
        while chunk := os.read(main, 65536):
            shown += chunk
    except OSError:  # the other end has closed
        pass
    os.close(main)
    return process.wait(timeout=60), shown.decode()
