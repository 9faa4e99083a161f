"""The commands that are broken: small trainings in each mode, by each launcher, on 1 to 4 processes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers.launching import BIN, CLEAN, ROOT

from soak.processes import MARK

LAST_STEP = 40
COMMON = (
    *("run.name=a", "run.report=false", "model.target=helpers.networks.Unhurried", "data.target=helpers.data_sets.Blocks"),
    *("data.args.count=300", "data.batch_size=30", "data.validation=60", "train.threads=1", "train.log_every=2"),
    *("train.epochs=5", "train.eval_every=2", "checkpoint.every_steps=5", "checkpoint.keep=2", "optim.lr=0.002"),
    *("sync.timeout_s=8", "sync.join_timeout_s=40"),
)


@dataclass(frozen=True)
class Training:
    """What is trained; on any number of processes only where that does not change the result."""

    options: tuple[str, ...]
    any_world: bool = False


TRAININGS = {
    "exact": Training(
        ("sync.mode=exact", "sync.shards=4", "data.focus=2", "optim.ema=0.9", "optim.clip_norm=1", "model.args.pause=0.012"),
        True,
    ),
    "ddp": Training(("sync.mode=ddp", "model.args.pause=0.04")),
    "local": Training(("sync.mode=local", "sync.every=4", "model.args.pause=0.04")),
    "ddp, compressed": Training(("sync.mode=ddp", "sync.compress=powersgd", "optim.ema=0.9", "model.args.pause=0.04")),
    "local, overlapped": Training(("sync.mode=local", "sync.every=4", "sync.overlap=true", "model.args.pause=0.04")),
}
RESTARTING = ("torchrun that restarts", "accelerate that restarts")
LAUNCHERS = ("torchrun", "accelerate", *RESTARTING)


@dataclass(frozen=True)
class Launch:
    """How a training is started."""

    launcher: str
    world_size: int

    @property
    def restarts(self) -> bool:
        return self.launcher in RESTARTING

    def command(self, options: tuple[str, ...]) -> list[str]:
        number, what = str(self.world_size), ["-m", "digitdist.train", *COMMON, *options]
        accelerate = [str(BIN / "accelerate"), "launch", "--num_processes", number]
        head = {
            "python": [sys.executable],
            "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", number],
            "accelerate": [*accelerate, *(["--multi_gpu", "--main_process_port", "0"] if self.world_size > 1 else [])],
            "torchrun that restarts": [
                *(str(BIN / "torchrun"), "--nproc-per-node", number, "--max-restarts", "3"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
            ],
            "accelerate that restarts": [
                *accelerate,
                *("--config_file", str(ROOT / "launch/elastic.yaml"), "--max_restarts", "3"),
            ],
        }
        return [*_ordinary_rights(), *head[self.launcher], *what]

    def __str__(self) -> str:
        return f"{self.launcher}, {self.world_size} processes"


def draw_launch(drawn: random.Random, world_size: int) -> Launch:
    launchers = ("python", "torchrun", "accelerate") if world_size == 1 else LAUNCHERS
    return Launch(drawn.choice(launchers), world_size)


def start(command: list[str], place: Path, mark: str, output: Path) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own, as a terminal does; what it prints goes into `output`."""
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), str(ROOT), CLEAN.get("PYTHONPATH"))))
    temporary = place / "tmp"
    temporary.mkdir(exist_ok=True)
    env = CLEAN | {"PYTHONPATH": path, "TMPDIR": str(temporary), MARK: mark}
    with output.open("wb") as opened:
        streams: dict = {"stdin": subprocess.DEVNULL, "stdout": opened, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=place, env=env, start_new_session=True, preexec_fn=_hear_signals, **streams)


def _hear_signals() -> None:
    """What starts the soak in the background ignores these, and so would all that it starts."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def _ordinary_rights() -> list[str]:
    """Root reads files that nobody may read; a command that begins with this does not."""
    if os.geteuid() or not shutil.which("setpriv"):
        return []
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
