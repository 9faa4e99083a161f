"""Faults: what may happen to a training at any moment, done to it from outside.

The number of a fault and the seed say what it is, when it is, and whom it meets, as far as that is there.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from soak import damage, processes
from soak.damage import Damage
from soak.launches import LAST_STEP, Launch
from soak.processes import Position, marked, ranks, send

# Each 15 faults in a row are these, shuffled.
DEAL = (
    *(
        "stop",
        "stop",
        "stop",
        "kill a rank",
        "kill a rank",
        "kill all",
        "kill the launcher",
        "freeze",
        "pause",
        "fill the disk",
    ),
    *("damage", "damage", "damage between", "damage between", "damage between"),
)
STOPS = ("TERM", "INT", "USR1", "HUP", "USR2", "STOP", "INT twice")
PHASES = ("start", "training", "save", "end")
AGAIN_S = 0.7  # between two ^C


@dataclass
class Fault:
    """One fault. `done` says what happened; `at` is where the training was."""

    number: int
    kind: str
    drawn: random.Random
    phase: str
    fraction: float  # of the time, or the steps, that are left
    done: str = ""
    at: Position | None = None
    damage: Damage | None = None
    whom: str = ""  # "launcher" or "rank"
    how: str = ""  # of a stop
    ends: bool = False  # whether the attempt is to end for it

    @property
    def in_training(self) -> bool:
        return self.at is not None and 1 <= self.at.step < LAST_STEP and self.at.phase not in ("start", "end")

    def __str__(self) -> str:
        where = f" at step {self.at.step}, phase {self.at.phase}" if self.at else ""
        return f"fault {self.number}: {self.done or self.kind}{where}"


def draw(seed: int, number: int, without: frozenset[str] = frozenset()) -> Fault:
    """The fault of this number, counted from 0."""
    deal = [kind for kind in DEAL if kind not in without]
    random.Random(f"{seed} deal {number // len(deal)}").shuffle(deal)
    drawn = random.Random(f"{seed} fault {number}")
    phase = drawn.choices(PHASES, (3, 5, 2, 2))[0]
    return Fault(number, deal[number % len(deal)], drawn, phase, drawn.random())


@dataclass
class Target:
    """An attempt that a fault is done to."""

    launch: Launch
    process: subprocess.Popen[bytes]
    mark: str
    folder: Path
    disk: Path | None  # a small file system that holds the run
    without: frozenset[str] = frozenset()
    paused: list[psutil.Process] = field(default_factory=list)
    _pids: tuple[float, set[int]] = (0.0, set())

    def position(self) -> Position | None:
        looked, pids = self._pids
        if time.monotonic() - looked > 0.3:
            pids = {process.pid for process in marked(self.mark)}
            self._pids = time.monotonic(), pids
        return processes.position(self.folder, pids)


def wait_for(fault: Fault, target: Target, timeout_s: float) -> bool:
    """Waits for the moment of a fault; False where the attempt has ended before it."""
    began, first = time.monotonic(), target.position()
    delay_s = {"start": 8.0, "end": 0.7, "save": 0.03}.get(fault.phase, 0.05) * fault.fraction
    step = (first.step if first else 0) + 1
    while target.process.poll() is None and time.monotonic() - began < timeout_s:
        now = target.position()
        if now and not first:
            first, step = now, now.step + 1
        goal = step + fault.fraction * (LAST_STEP - step)
        arrived = {
            "start": True,
            "training": now is not None and now.step >= goal,
            "save": now is not None and now.phase == "save" and now.step >= goal / 2,
            "end": now is not None and now.step >= LAST_STEP,
        }[fault.phase]
        if arrived:
            deadline = time.monotonic() + delay_s
            while target.process.poll() is None and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(left, 0.05))
            return target.process.poll() is None
        time.sleep(0.002)
    return False


def do(fault: Fault, target: Target) -> bool:
    """Does it; False where nothing was there to do it to."""
    fault.at = target.position()
    kinds = {"stop": _stop, "freeze": _freeze, "pause": _pause, "fill the disk": _fill, "damage": _damage}
    return kinds.get(fault.kind, _kill)(fault, target)


def release(target: Target) -> None:
    """Ends what a fault has left: a full disk, a pause."""
    send(target.paused, signal.SIGCONT)
    if target.disk:
        (target.disk / "filler").unlink(missing_ok=True)


def _rank(fault: Fault, target: Target) -> tuple[int, psutil.Process] | None:
    """A rank of those that are there."""
    found = ranks(marked(target.mark))
    return fault.drawn.choice(sorted(found.items())) if found else None


def _stop(fault: Fault, target: Target) -> bool:
    how = fault.drawn.choice([stop for stop in STOPS if stop not in target.without])
    if how == "STOP":
        if not target.folder.is_dir():
            return False
        (target.folder / "STOP").touch()
        return _was_done(fault, "rank", "the file STOP", "STOP")
    one = _rank(fault, target)
    if fault.drawn.random() < 0.5 and one and how != "INT twice":
        os.kill(one[1].pid, getattr(signal, f"SIG{how}"))
        return _was_done(fault, "rank", f"SIG{how} to rank {one[0]}", how)
    to_group = how.startswith("INT") or how == "HUP"  # as a terminal does
    for again in range(2 if how == "INT twice" else 1):
        time.sleep(AGAIN_S * again)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to_group else os.kill)(target.process.pid, getattr(signal, f"SIG{how.split()[0]}"))
    return _was_done(fault, "launcher", f"SIG{how} to the launcher", how)


def _kill(fault: Fault, target: Target) -> bool:
    if fault.kind == "kill a rank":
        one = _rank(fault, target)
        if one is None:
            return False
        os.kill(one[1].pid, signal.SIGKILL)
        return _was_done(fault, "rank", f"SIGKILL to rank {one[0]}", ends=not target.launch.restarts)
    if fault.kind == "kill all":
        send(marked(target.mark), signal.SIGKILL)
        return _was_done(fault, "launcher", "SIGKILL to all processes")
    target.process.kill()
    return _was_done(fault, "launcher", "SIGKILL to the launcher")


def _freeze(fault: Fault, target: Target) -> bool:
    if target.launch.world_size == 1:
        return _pause(fault, target)
    one = _rank(fault, target)
    if one is None:
        return False
    os.kill(one[1].pid, signal.SIGSTOP)
    return _was_done(fault, "rank", f"rank {one[0]} frozen for good", ends=not target.launch.restarts)


def _pause(fault: Fault, target: Target) -> bool:
    """For less than the time after which a rank counts as frozen."""
    one, seconds = _rank(fault, target), fault.drawn.uniform(0.2, 2)
    whom = fault.drawn.choice(["the launcher", "all", "a rank"])
    target.paused = {
        "the launcher": [psutil.Process(target.process.pid)],
        "all": marked(target.mark),
        "a rank": [one[1]] if one else [],
    }[whom]
    send(target.paused, signal.SIGSTOP)
    time.sleep(seconds)
    send(target.paused, signal.SIGCONT)
    return _was_done(fault, "", f"{whom} frozen for {seconds:.1f} s", ends=False)


def _fill(fault: Fault, target: Target) -> bool:
    assert target.disk is not None
    with (target.disk / "filler").open("wb", buffering=0) as filler:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError:
                continue
    if fault.drawn.random() < 0.5:
        return _was_done(fault, "", "the disk is full until the attempt has ended", ends=False)
    seconds = fault.drawn.uniform(0.05, 2)
    time.sleep(seconds)
    (target.disk / "filler").unlink()
    return _was_done(fault, "", f"the disk is full for {seconds:.2f} s", ends=False)


def _damage(fault: Fault, target: Target) -> bool:
    if target.folder.is_dir():
        fault.damage = damage.do(target.folder, fault.drawn, target.without)
    return bool(fault.damage) and _was_done(fault, "", str(fault.damage), ends=False)


def _was_done(fault: Fault, whom: str, done: str, how: str = "", ends: bool = True) -> bool:
    fault.whom, fault.done, fault.how, fault.ends = whom, done, how, ends
    return True
