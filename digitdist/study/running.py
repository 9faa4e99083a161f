"""Runs trained side by side, each in a process of its own by the trainer's own command, and ended with this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from digitdist.distributed import STUDY, StopRequest
from digitdist.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from digitdist.runs import RESULT, is_in_use
from digitdist.study.planning import Training
from digitdist.study.progress import Progress, share_done
from digitdist.study.slots import Slot

LOOK_EVERY_S = 0.05
SHOW_EVERY_S = 0.5
LEAVING_S = 15.0  # in which trainings whose study was killed save and leave their runs' folders
OF_ONE_RUN = ("WANDB_RUN_ID",)  # environment variables that many runs must not share
MAX_LINES = 50  # of what a failed training has printed last


@dataclass
class Outcome:
    """How trainings have ended: seconds of the whole command of each that is done, and why others failed."""

    seconds: dict[Path, float] = field(default_factory=dict)
    failures: dict[Path, str] = field(default_factory=dict)
    stopped: list[Path] = field(default_factory=list)


@dataclass
class _Child:
    training: Training
    slot: Slot
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    started_s: float


def train_all(trainings: Sequence[Training], slots: Sequence[Slot], progress: Progress, stop: StopRequest) -> Outcome:
    """Trains each of `trainings`, one in each of `slots` at a time, until all have ended, or `stop` is requested.

    One that fails is told, and the others go on; but a mistake of the user's before any run is done would be that of all. The
    processes have sessions of their own, so that ^C reaches this one alone, which passes a stop on as SIGTERM; where this one
    is killed, they save and end by themselves.

    Raises:
        UserError: that mistake, or another study trains the same runs.
    """
    outcome, waiting, free, children = Outcome(), deque(trainings), list(slots), list[_Child]()
    asked, shown_s, mistake = False, 0.0, ""

    def goes_on() -> bool:
        return not stop.requested and bool(outcome.seconds or not mistake)

    try:
        _await_leavers(trainings, progress)
        while children or (waiting and goes_on()):
            while waiting and free and goes_on():
                children.append(_start(waiting.popleft(), free.pop(0)))
            if stop.requested and not asked:
                asked = True
                _send(children, signal.SIGTERM)
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                free.append(child.slot)
                if _end(child, outcome, progress, asked) == EXIT_USER_ERROR and not outcome.seconds:
                    mistake = mistake or outcome.failures[child.training.folder]
            if time.monotonic() - shown_s > SHOW_EVERY_S:
                shown_s = time.monotonic()
                progress.show([share_done(child.training.folder, child.training.config) for child in children])
            time.sleep(LOOK_EVERY_S)
    except BaseException:  # ^C again
        _send(children, signal.SIGKILL)
        raise
    finally:
        progress.close()
    if mistake and not outcome.seconds:
        raise UserError(mistake)
    outcome.stopped += [training.folder for training in waiting] if stop.requested else []
    return outcome


def _start(training: Training, slot: Slot) -> _Child:
    """Starts a training; what it prints goes to a file that has no name."""
    threads = [f"train.threads={slot.threads}"] if slot.threads else []
    command = [sys.executable, "-m", "digitdist.train", *training.arguments, *threads]
    environment = {name: value for name, value in os.environ.items() if name not in OF_ONE_RUN}
    environment |= slot.environment | {STUDY: str(os.getpid())}
    output = tempfile.TemporaryFile()  # noqa: SIM115, it is read when the process has ended
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    return _Child(training, slot, process, output, time.perf_counter())


def _end(child: _Child, outcome: Outcome, progress: Progress, asked: bool) -> int:
    """Notes and shows how a training has ended, which was `asked` to; returns its exit code."""
    folder, code = child.training.folder, child.process.returncode
    child.output.seek(0)
    lines = child.output.read().decode(errors="replace").splitlines()
    child.output.close()
    if code == 0:
        outcome.seconds[folder] = time.perf_counter() - child.started_s
        progress.ended(f"{folder}: {_result(folder)}")
    elif code == EXIT_STOPPED or (asked and code == -signal.SIGTERM):  # while it started
        outcome.stopped.append(folder)
    else:
        outcome.failures[folder] = _reason(lines, code)
        if code != EXIT_USER_ERROR or outcome.seconds:  # else it is that of all, and told at the end
            progress.print("\n".join([f"{folder} failed: {outcome.failures[folder]}", *lines[-MAX_LINES:]]))
    return code


def _result(folder: Path) -> str:
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return f"{100 * result['test_accuracy']:.2f} % of the test images right, {result['train_seconds']:.2f} s of training"


def _reason(lines: Sequence[str], code: int) -> str:
    """Why a training has failed: the mistake that it has told, else its last line, with its exit code."""
    if code == EXIT_USER_ERROR:
        starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        if starts:
            return "\n".join([lines[starts[-1]].removeprefix("error: "), *lines[starts[-1] + 1 :]])
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"{how}: {last}" if last else how


def _send(children: Sequence[_Child], number: int) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.send_signal(number)


def _await_leavers(trainings: Sequence[Training], progress: Progress) -> None:
    """Waits a while for trainings that an earlier study, killed a moment ago, has left.

    Raises:
        UserError: one stays.
    """
    in_use = [training for training in trainings if is_in_use(training.folder)]
    if in_use:
        progress.print(f"{in_use[0].folder}: another training works in this run; waits {LEAVING_S:.0f} s for it to end")
    deadline = time.monotonic() + LEAVING_S
    while staying := [training for training in in_use if is_in_use(training.folder)]:
        if time.monotonic() > deadline:
            raise UserError(f"{staying[0].folder}: another training works in it, perhaps of a study of this NAME; wait for it")
        time.sleep(LOOK_EVERY_S)
