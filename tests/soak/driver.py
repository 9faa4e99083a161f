"""The soak: trainings that are broken at random moments and started again, until they end as the unbroken ones do.

A soak is a row of runs. A run is started, broken, damaged and started again until an attempt ends with 0; then the same command
is given once more, and what the run has left is compared with a run of the same configuration that nothing has happened to.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from soak import damage, faults
from soak.checks import Attempt, Record, destroyed, final_problems, openings, problems
from soak.faults import Fault, Target
from soak.launches import LAST_STEP, TRAININGS, Launch, draw_launch, start
from soak.processes import end_all, left_after

BOUND_S = 150.0  # for an attempt to end after its last fault, on a busy machine
LEFT_S = 15.0  # for its processes to end after it
MOST_FAULTS = 6  # of a run


class Broken(AssertionError):
    """A run did not survive; the message has its seed, its history and its last output."""


@dataclass
class Soak:
    """Breaks runs in `place` with the faults that follow from `seed`. `without`: names of kinds of faults to leave out."""

    place: Path
    seed: int
    trainings: tuple[str, ...] = tuple(TRAININGS)
    without: frozenset[str] = frozenset()
    print: Callable[[str], None] = print
    number: int = 0  # of the next fault
    num_done: int = 0  # faults that have happened
    num_survived: int = 0  # of them, in runs that have ended as they should
    num_runs: int = 0
    num_attempts: int = 0
    history: list[str] = field(default_factory=list)  # of the run
    _unbroken: dict[str, Path] = field(default_factory=dict)

    def run(self, num_faults: int, keep_going: bool = False) -> list[Broken]:
        """Breaks runs until so many faults have happened.

        Raises:
            Broken: the first run that did not survive; with `keep_going` all are returned.
        """
        broken = []
        while self.num_done < num_faults:
            begin, name = self.num_done, self.trainings[self.num_runs % len(self.trainings)]
            try:
                _Run(self, name, num_faults - begin).go()
                self.num_survived += self.num_done - begin
            except Broken as error:
                if not keep_going:
                    raise
                self.print(f"BROKEN: {error}")
                broken.append(error)
            self.num_runs += 1
        return broken

    def unbroken(self, name: str, launch: Launch) -> Path:
        """The folder of the run that nothing has happened to, of this training and, where that matters, this world."""
        training = TRAININGS[name]
        key = name if training.any_world else f"{name}, {launch.world_size}"
        if key not in self._unbroken:
            place = self.place / "unbroken" / key
            place.mkdir(parents=True)
            output, own = place / "output", Launch("torchrun", 2 if training.any_world else launch.world_size)
            process = start(own.command((*training.options, "tracking.wandb=disabled")), place, f"{key} {time.time()}", output)
            if process.wait(timeout=BOUND_S):
                raise Broken(f"the unbroken run failed: {output.read_text()}")
            self._unbroken[key] = place / "runs/a"
        return self._unbroken[key]


class _Run:
    """One run of a soak."""

    def __init__(self, soak: Soak, name: str, num_faults: int):
        self.soak, self.training = soak, TRAININGS[name]
        self.end = soak.num_done + min(num_faults, MOST_FAULTS)
        self.drawn = random.Random(f"{soak.seed} run {soak.num_runs}")
        self.world_size = self.drawn.randint(1, 4) if self.training.any_world else self.drawn.choice([1, 2, 2, 3])
        self.wandb = self.drawn.choice(["disabled", "disabled", "offline"])
        self.unbroken = soak.unbroken(name, Launch("torchrun", self.world_size))
        self.record = Record(damage.lines(self.unbroken))
        self.placed: set[str] = set()
        self.to_be_named: set[str] = set()  # files of the finished run that damage has hit
        self.held: list[Fault] = []  # damage for when the attempt has ended
        self.finished = False
        self.num_openings = 0  # of this attempt, that the record knows
        self.place, self.folder = soak.place, soak.place / "runs/a"
        soak.history = [f"{name}, W&B {self.wandb}"]
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def disk(self) -> Path | None:
        return self.place / "runs" if os.path.ismount(self.place / "runs") else None

    def go(self) -> None:
        """Breaks and resumes the run until it has ended, and then compares it."""
        while not self.finished or self.held:
            while self.held:
                self._damage_between(self.held.pop(0))
            attempt = self._attempt(self._break)
            self.finished = attempt.code == 0
        if attempt.openings and self._attempt(lambda target: []).code != 0:  # the first one trained: it ends as finished again
            self._fail(["the finished run does not end with 0"])
        try:
            found = list(final_problems(self.folder, self.unbroken, self.record, self.placed))
        except (OSError, ValueError, KeyError, RecursionError, zipfile.BadZipFile) as error:
            found = [f"what the finished run has left cannot be read: {error!r}"]
        self._fail(found, self.output.read_text(errors="replace"))
        self.soak.print(f"survived: {'; '.join(self.soak.history)}")

    def _draw(self) -> Fault:
        without = self.soak.without | (frozenset() if self.disk else frozenset(["fill the disk"]))
        return faults.draw(self.soak.seed, self.soak.number, without)

    def _damage_between(self, fault: Fault) -> None:
        if self.folder.is_dir():
            fault.damage = damage.do(self.folder, fault.drawn, self.soak.without)
        if fault.damage:
            fault.done = f"between attempts, {fault.damage}"
            self._note(fault)
            if self.finished:
                self.to_be_named |= set(destroyed(self.folder, self.unbroken))

    def _note(self, fault: Fault) -> None:
        self.soak.num_done += 1
        self._say(str(fault))
        if not fault.damage:
            return
        self.record.note(self.folder, fault.damage)
        if fault.damage.kind == damage.EXTRA:
            self.placed |= set(fault.damage.files)
        if fault.damage.hits("result.json"):
            self._note_spoilt_result()

    def _note_spoilt_result(self) -> None:
        try:
            found = json.loads(damage.read(self.folder / "result.json"))  # where there may be a FIFO
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(found, dict):
            self.record.spoilt_results.append(found)

    def _attempt(self, break_it: Callable[[Target], list[Fault]]) -> Attempt:
        """Starts the run once, breaks it, and checks how it ends."""
        self.soak.num_attempts += 1
        mark = f"{self.soak.seed} {self.soak.num_attempts} {os.getpid()}"
        if self.training.any_world:
            self.world_size = self.drawn.randint(1, 4)
        launch, self.num_openings = draw_launch(self.drawn, self.world_size), 0
        self._say(str(launch))
        intact = damage.intact_steps(self.folder)
        shutil.rmtree(self.place / "tmp", ignore_errors=True)
        process = start(launch.command((*self.training.options, f"tracking.wandb={self.wandb}")), self.place, mark, self.output)
        target = Target(launch, process, mark, self.folder, self.disk, self.soak.without)
        try:
            done = break_it(target)
            began = time.monotonic()
            code = _wait(process, BOUND_S)
            seconds = time.monotonic() - began
            left = [] if code is None else left_after(mark, LEFT_S)
        finally:
            faults.release(target)
            end_all(mark)
            process.wait()
        self._take_in_openings()
        text = self.output.read_text(errors="replace")
        found = [path.name for path in (self.place / "tmp").iterdir()]
        temporary = [name for name in found if "wandb" in name or "digitdist" in name]  # others are torch's
        attempt = Attempt(launch, done, code, text, seconds, intact, damage.intact_steps(self.folder), left, temporary)
        self._say(f"exit code {code}")
        if max(attempt.openings, default=LAST_STEP) < LAST_STEP:  # it trains again, after which these are new in any case
            self.to_be_named -= {"result.json", "predictions.npz"}
        unnamed = [f"that {name} was damaged is not said" for name in sorted(self.to_be_named) if name not in text]
        self.to_be_named = set()
        self._fail([*problems(attempt), *(unnamed if code == 0 else [])], text)
        return attempt

    def _break(self, target: Target) -> list[Fault]:
        """Does faults to an attempt until it ends for one, or by itself."""
        done: list[Fault] = []
        while self.soak.num_done + len(self.held) < self.end:
            fault = self._draw()
            if fault.kind == "damage between":
                self.held.append(fault)
                self.soak.number += 1
                continue
            if not faults.wait_for(fault, target, BOUND_S):
                break
            self.soak.number += 1
            self._take_in_openings()
            if not faults.do(fault, target):
                continue
            done.append(fault)
            self._note(fault)
            if fault.ends:
                break
        return done

    def _take_in_openings(self) -> None:
        """Tells the record of the starts that the attempt has printed since the last look."""
        new = openings(self.output.read_text(errors="replace"))[self.num_openings :]
        for step in new:
            self.record.opened(step)
        self.num_openings += len(new)

    @property
    def output(self) -> Path:
        return self.place / "output"

    def _say(self, text: str) -> None:
        self.soak.history.append(text)
        self.soak.print(f"  {text}")

    def _fail(self, found: list[str], output: str = "") -> None:
        """Raises `Broken` if there is anything."""
        if found:
            history = "\n    ".join(self.soak.history)
            chosen = [self.soak.trainings, *([("--without", *sorted(self.soak.without))] if self.soak.without else [])]
            options = shlex.join(word for group in chosen for word in group)
            command = f"python -m soak --seed {self.soak.seed} --faults {self.soak.num_done} --training {options}"
            text = "\n  ".join(found)
            raise Broken(f"seed {self.soak.seed}: {text}\n    {history}\n  again: {command}\n{output[-6000:]}")


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
