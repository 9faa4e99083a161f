"""What must hold after each attempt, and of the run at its end."""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from soak import damage
from soak.damage import Damage
from soak.faults import Fault
from soak.launches import LAST_STEP, Launch

OPENING = re.compile(r"run +runs/a (?:starts|resumes at step (\d+))")
IN_VAIN = "without a step of progress"  # what a launcher's restarts may end with
FULL = "No space left on device"


@dataclass
class Attempt:
    """One start of a run, as it is seen afterwards."""

    launch: Launch
    faults: Sequence[Fault]
    code: int | None  # None: it hung
    output: str
    seconds_from_last_fault: float
    intact_before: Sequence[int]  # steps of checkpoints
    intact_after: Sequence[int]
    left: Sequence[str]  # processes
    temporary: Sequence[str] = ()  # what it has left in the folder for temporary files

    @property
    def damages(self) -> list[Damage]:
        return [fault.damage for fault in self.faults if fault.damage]

    @property
    def disk_was_full(self) -> bool:
        return any(fault.kind == "fill the disk" for fault in self.faults)

    @property
    def had_frozen(self) -> bool:
        return any("frozen for good" in fault.done for fault in self.faults)

    @property
    def openings(self) -> list[int]:
        return openings(self.output)


def openings(output: str) -> list[int]:
    """The step at which each start of the workers began."""
    return [int(step or 0) for step in OPENING.findall(output)]


def problems(attempt: Attempt) -> Iterator[str]:
    """What is wrong with an attempt."""
    if attempt.code is None:
        yield "it hangs"
    if attempt.left:
        yield f"processes are left: {attempt.left}"
    wandb_was_killed = "W&B does not answer" in attempt.output  # on a machine that is too busy
    if attempt.code in (0, 75) and not attempt.faults and attempt.temporary and not wandb_was_killed:
        yield f"left in TMPDIR: {attempt.temporary}"
    full_at_start = attempt.disk_was_full and FULL in attempt.output
    refusals = [line for line in attempt.output.splitlines() if line.startswith("error:")]
    if attempt.had_frozen:  # before it has joined, it is one that has not come, or rank 0 does not answer
        refusals = [line for line in refusals if "within sync.join_timeout_s" not in line]
    ended = any(fault.done.startswith("SIGKILL") or "to the launcher" in fault.done for fault in attempt.faults)
    if ended:  # what served the store where ranks meet
        refusals = [line for line in refusals if "where the ranks were meeting, has closed" not in line]
    if refusals and not full_at_start:
        yield f"a mistake of the user's is reported: {refusals}"
    hit_checkpoints = any(found.hits("checkpoints") for found in attempt.damages)
    newest = max(attempt.intact_before, default=0)
    if attempt.openings and not hit_checkpoints and attempt.openings[0] != newest:
        yield f"it began at step {attempt.openings[0]}, and the newest intact checkpoint is of step {newest}"
    if not hit_checkpoints and newest and newest not in attempt.intact_after and max(attempt.intact_after, default=0) < newest:
        yield f"the intact checkpoint of step {newest} has gone"
    yield from _problems_of_end(attempt, hit_checkpoints)
    yield from (f"a traceback: {found}" for found in _tracebacks(attempt))


def _problems_of_end(attempt: Attempt, hit_checkpoints: bool) -> Iterator[str]:
    """Whether its exit code is one that its faults explain, and what must then have been saved and said."""
    ending = next((fault for fault in attempt.faults if fault.ends), None)
    heartbeat = any(found.hits(".heartbeat") for found in attempt.damages)
    if ending is None:
        explained = heartbeat or (attempt.disk_was_full and FULL in attempt.output) or IN_VAIN in attempt.output
        if attempt.code != 0 and not explained:
            yield f"exit code {attempt.code} where nothing has ended it"
        return
    if ending.kind == "stop":
        yield from _problems_of_stop(attempt, ending, hit_checkpoints)
    alone = ending.kind in ("kill a rank", "freeze") and ending.in_training and not heartbeat
    others = attempt.launch.world_size > 1 and not attempt.launch.restarts
    if alone and others and not re.search(r"^fault: rank \d+ ", attempt.output, re.M):
        yield "no line names the rank that failed"


def _problems_of_stop(attempt: Attempt, stop: Fault, hit_checkpoints: bool) -> Iterator[str]:
    if stop.how == "INT twice":
        # Launchers give a process 30 s to end, and one that is frozen needs them all.
        allowed = 45 if attempt.had_frozen else 15
        if attempt.seconds_from_last_fault > allowed:
            yield f"two ^C took {attempt.seconds_from_last_fault:.0f} s"
        return
    if not (stop.in_training and stop.at) or attempt.code == 0 or attempt.had_frozen:  # which no rank can save without
        return
    saved = max(attempt.intact_after, default=0)
    if saved < stop.at.step and not hit_checkpoints and not attempt.disk_was_full:
        yield f"it was asked to stop at step {stop.at.step}, and the newest checkpoint is of step {saved}"
    if attempt.launch.launcher == "python" and attempt.code != 75 and not attempt.disk_was_full:
        yield f"exit code {attempt.code} after a request to stop"


def _tracebacks(attempt: Attempt) -> Iterator[str]:
    """Tracebacks that nobody expects: not those by which launchers report that a worker has ended, nor that of ^C before the
    training hears it, nor that of a fault which a full disk is."""
    lines = [re.sub(r"^\[rank\d+\]:\s?", "", line) for line in attempt.output.splitlines()]
    for number, line in enumerate(lines):
        if not line.startswith("Traceback (most recent call last)"):
            continue
        rest = lines[number + 1 :]
        length = next((i for i, text in enumerate(rest) if text and not text[0].isspace()), len(rest))
        frames, last = "\n".join(rest[:length]), rest[length] if length < len(rest) else ""
        launchers = re.search(r"distributed/(run|elastic|launcher)|accelerate/commands", frames) and "digitdist/" not in frames
        interrupted = "KeyboardInterrupt" in last and any(f.how.startswith("INT") for f in attempt.faults)
        full = attempt.disk_was_full and FULL in last and "Fault:" in last
        vain = IN_VAIN in last
        if not (launchers or interrupted or full or vain):
            yield f"{last[:300]} ({' | '.join(frames.split(chr(10))[-4:])})"


@dataclass
class Record:
    """Which metric lines may be missing at the end, since damage has hit them: see `soak.damage`."""

    expected: list[str]
    excused: set[str] = field(default_factory=set)
    strange: set[str] = field(default_factory=set)  # lines that damage has made
    spoilt_results: list[dict] = field(default_factory=list)  # what damage has made of the result

    def note(self, folder: Path, found: Damage) -> None:
        """Looks at what damage has left, right after it."""
        if found.hits("metrics.jsonl"):
            left = damage.lines(folder)
            self.strange |= set(left) - set(self.expected)
            intact = set() if found.replaced else set(left)
            self.excused |= set(self.expected) - intact

    def opened(self, step: int) -> None:
        """An attempt has resumed at `step`, and writes the later lines again."""
        self.excused = {line for line in self.excused if damage.step_of(line) <= step}


def destroyed(folder: Path, unbroken: Path) -> Iterator[str]:
    """The files of a finished run whose damage it must name. Damage that leaves a valid record cannot be seen."""
    if not set(damage.lines(unbroken)) <= set(damage.lines(folder)) and not damage.are_all_events(folder):
        yield "metrics.jsonl"
    try:
        hash_before = json.loads((unbroken / "result.json").read_text())["weights_sha256"]
        result_is_there = json.loads(damage.read(folder / "result.json"))["weights_sha256"] == hash_before
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        result_is_there = False
    if not result_is_there:
        yield "result.json"
    try:
        saved = np.load(io.BytesIO(damage.read(folder / "predictions.npz")))
        all_there = all(saved[name].size for name in ("index", "label", "prediction", "probability"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError, zlib.error):
        all_there = False
    if not all_there:
        yield "predictions.npz"


def final_problems(folder: Path, unbroken: Path, record: Record, placed: set[str]) -> Iterator[str]:
    """What differs between a finished run and the unbroken one; `placed` are names of files that damage has added."""
    lines = damage.lines(folder)
    known = [line for line in lines if line not in record.strange]
    if len(set(known)) < len(known):
        yield "a metric line is there twice"
    if [line for line in record.expected if line in set(known)] != known:
        yield f"metric lines differ, or their order: {[line for line in known if line not in record.expected][:3]}"
    missing = [line for line in record.expected if line not in set(known) and line not in record.excused]
    if missing:
        yield f"{len(missing)} metric lines are missing: {missing[:2]}"
    ours, theirs = (json.loads((place / "result.json").read_text()) for place in (folder, unbroken))
    for name in ("test_correct", "test_total", "test_loss", "test_accuracy", "steps", "epochs", "weights_sha256"):
        if ours.get(name) != theirs[name] and not any(spoilt.get(name) == ours.get(name) for spoilt in record.spoilt_results):
            yield f"{name} is {ours.get(name)}, and {theirs[name]} in the unbroken run"
    predicted, expected = (np.load(place / "predictions.npz") for place in (folder, unbroken))
    if any(predicted[name].tobytes() != expected[name].tobytes() for name in expected):
        yield "predictions differ"
    if LAST_STEP not in damage.intact_steps(folder):
        yield "the last checkpoint is not intact"
    ours, theirs = (_hidden(place) for place in (folder, unbroken))
    moved = re.compile(r"\.lock\.unexpected|(.*/)?\.DS_Store$")  # what was found in place of the lock, and a desktop's file
    if extra := {name for name in ours - theirs - placed if not moved.match(name)}:
        yield f"temporary files are left: {sorted(extra)}"
    try:
        FileLock(folder / ".lock").acquire(timeout=0).lock.release()
    except Timeout:
        yield "the lock is held"
    outside = folder.parent.parent / damage.OUTSIDE
    if outside.exists() and outside.read_bytes() != damage.OURS:
        yield f"{outside}, to which a link led, was written to"
    for name in placed:
        if name.endswith("-keep") and not (folder / name).is_dir():
            yield f"{name}, which is not the run's, has gone"


def _hidden(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob(".*") if "wandb" not in path.parts}
