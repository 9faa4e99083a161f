"""What has started this process: a launcher, with which it ends, or somebody's shell or program, without which it goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path, PurePath
from typing import NoReturn

import psutil
import yaml

from digitdist.errors import EXIT_FAULT
from digitdist.process_start import PARENT
from digitdist.world import max_restarts, restart_count, several_hosts, under_accelerate, under_torchelastic

LAUNCHERS = ("torchrun", "accelerate", "accelerate-launch", "mpirun", "mpiexec", "wandb")  # as programs; `wandb agent`
LAUNCHER_MODULES = ("torch.distributed.", "accelerate.commands.")  # as in python -m
DAEMONS = ("slurmstepd", "orted", "prted", "hydra_pmi_proxy")  # of srun and of MPI's launchers, by the names of processes
STUDY = "DIGITDIST_STUDY"  # the number of the process, a study, that has started this one
DECIDED = ("distributed_type", "num_processes", "mixed_precision", "use_cpu")  # by Accelerate's default configuration
# What psutil raises where a process is gone, hidden, or described otherwise than Linux does.
PSUTIL_ERRORS = (psutil.Error, OSError, RuntimeError, ValueError, IndexError)
LOOK_EVERY_S = 0.5
END_GRACE_S = 120.0  # for the step that is going on, and its checkpoint, once the launcher has ended


def launcher_start_time() -> float | None:
    """When this process's launcher was started, in seconds since 1970: the same after a restart.

    None without a launcher, for a program, such as a notebook, that launches trainings of its own and restarts none, and where
    the system does not tell.
    """
    if not under_torchelastic():
        return None
    try:
        return psutil.Process(os.getppid()).create_time() if max_restarts() or is_launcher(os.getppid()) else None
    except PSUTIL_ERRORS:
        return None


def follow_launcher() -> None:
    """Has this process end with its launcher: with a checkpoint, as if it were asked to by SIGTERM.

    torchrun gives its workers sessions of their own, and `accelerate launch` passes no signal on to a single process: a
    training would go on unseen, and hold the run's lock. On several hosts it ends at once, as with a host that is lost, since
    the others are to go on from the last checkpoint.
    """
    of_study = os.environ.get(STUDY) == str(PARENT)
    if of_study or under_torchelastic() or is_launcher(PARENT) or (os.getppid() != PARENT and under_accelerate()):
        threading.Thread(target=_end_after_launcher, name="launcher", daemon=True).start()


def launcher_has_ended() -> bool:
    return os.getppid() != PARENT


def end_restarting_launcher() -> None:
    """Ends a launcher that would start the workers again, which neither mends a mistake nor is wanted after a stop."""
    if under_torchelastic() and restart_count() < max_restarts() and is_launcher(os.getppid()):
        os.kill(os.getppid(), signal.SIGTERM)


def is_launcher(pid: int) -> bool:
    """Whether this process is a launcher, and not a shell or somebody's own program; False where the system does not tell."""
    try:
        process = psutil.Process(pid)
        if process.name().split(":")[0] in DAEMONS:
            return True
        return any(PurePath(word).name in LAUNCHERS or word.startswith(LAUNCHER_MODULES) for word in process.cmdline()[:4])
    except PSUTIL_ERRORS:
        return False


def default_launch_config() -> str | None:
    """What Accelerate's own ``default_config.yaml`` decides of this launch, with its path; None where it decides nothing.

    `accelerate launch` reads that file, which `accelerate config` wrote at some time, wherever it is given no other.
    """
    if not under_accelerate() or not is_launcher(os.getppid()):
        return None
    from accelerate.commands.config.config_args import default_config_file  # only here, since it imports much else

    file = Path(default_config_file)
    try:
        words = psutil.Process(os.getppid()).cmdline()
        if not file.is_file():
            return None
        content = yaml.safe_load(file.read_text())  # JSON is YAML, too
    except (*PSUTIL_ERRORS, yaml.YAMLError):
        return None
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    if given & {"config_file", "cpu"} or not isinstance(content, dict):
        return None
    decided = [f"{name}={content[name]}" for name in DECIDED if content.get(name) is not None and name not in given]
    return (
        f"{file} decides {', '.join(decided)}; give accelerate launch another --config_file, or remove it" if decided else None
    )


def _end_after_launcher() -> NoReturn:
    while not launcher_has_ended():
        time.sleep(LOOK_EVERY_S)
    if not several_hosts():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(END_GRACE_S)
    os._exit(EXIT_FAULT)
