"""Which rank ended a run, when a collective has failed because one did not take part."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch.distributed as dist

from digitdist.distributed.heartbeat import LEFT, NOTICED, RAISED, RUNNING, Beat, Heartbeat
from digitdist.distributed.launcher import PSUTIL_ERRORS

# Gloo begins what it says with a place in its sources, but for this.
OF_GLOO = re.compile(r"\[\S*/gloo/\S+\.(cc|h):\d+\] |Application timeout caused pair closure")
SEARCH_S = 2.0  # in which a process that was just killed is seen as gone
LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class FailedRank:
    """What happened to which rank, and whether this rank is the one of its host to report it; `silent`: nothing is known but
    that one did not answer in time, so it may only have been slow."""

    description: str
    reported_here: bool
    silent: bool = False


def is_collective_failure(error: BaseException) -> bool:
    """True for the error of a collective in which another rank did not take part.

    torch has types for the errors of NCCL and the store, and raises a plain `RuntimeError` for gloo's, which is known by its
    text. Either comes out of a call of torch's, or of ours, never out of a user's data set or network.
    """
    is_gloos = type(error) is RuntimeError and OF_GLOO.search(str(error)) is not None
    return (is_gloos or isinstance(error, dist.DistError)) and _is_raised_here(error)


def _is_raised_here(error: BaseException) -> bool:
    """Whether the last Python function that an error comes from is one of torch's or of this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "digitdist")


def has_failed(beat: Beat) -> bool:
    """Whether the run cannot go on for what is seen of this rank: it has failed, or has noticed another's failure."""
    return beat.state in (RAISED, NOTICED) or (beat.state == RUNNING and _is_gone(beat.pid))


def find_failed_rank(heartbeat: Heartbeat) -> FailedRank:
    """The rank of this host that raised an error, was killed or is frozen; else the one whose device, or with equal devices
    whose host, is behind all others.

    The lowest rank that is left reports it. A frozen process is killed, since a launcher would wait half a minute for it.
    """
    deadline = time.monotonic() + SEARCH_S
    beats = heartbeat.beats()
    while time.monotonic() < deadline:
        for what_happened, is_failed in _SIGNS.items():
            failed = [beat for beat in beats if is_failed(beat)]
            if failed:
                left = [beat for beat in beats if beat not in failed and not (beat.state == LEFT and _is_gone(beat.pid))]
                reported_here = heartbeat.rank == min(beat.rank for beat in left)
                if what_happened == "is frozen" and reported_here:
                    os.kill(failed[0].pid, signal.SIGKILL)
                return FailedRank(f"rank {failed[0].rank} {what_happened} at {failed[0].position}", reported_here)
        time.sleep(LOOK_EVERY_S)
        beats = heartbeat.beats()
    return _find_behind(beats, heartbeat)


def wait_for_others(heartbeat: Heartbeat, timeout_s: float) -> FailedRank | None:
    """Stays until the other ranks of this host have left, and none is frozen: a launcher waits for all, for ever if need be.

    Returns the one that has failed instead, as one does that is frozen for `timeout_s`.
    """
    frozen_s = 0.0
    while True:
        others = heartbeat.others()
        if any(map(has_failed, others)) or frozen_s > timeout_s:
            return find_failed_rank(heartbeat)
        is_one_frozen = any(_is_frozen(beat.pid) for beat in others)
        if not is_one_frozen and all(beat.state == LEFT for beat in others):
            return None
        time.sleep(LOOK_EVERY_S)
        frozen_s = frozen_s + LOOK_EVERY_S if is_one_frozen else 0.0


def _find_behind(beats: list[Beat], heartbeat: Heartbeat) -> FailedRank:
    """The rank that is behind all others of this host; if there is none, the one to blame may be on another host."""
    *_, before, last = [None, *sorted(beats, key=lambda beat: beat.place, reverse=True)]
    if before is not None and last is not None and before.place > last.place:
        reporter = min(beat.rank for beat in beats if beat is not last)
        return FailedRank(f"rank {last.rank} did not answer, last seen at {last.position}", heartbeat.rank == reporter, True)
    whose = "a rank of another host did not answer" if len(beats) < heartbeat.world_size else "the ranks wait for each other"
    return FailedRank(f"{whose}; rank {beats[0].rank} was at {beats[0].position}", heartbeat.rank == beats[0].rank, True)


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True
    except PSUTIL_ERRORS:  # a system that does not tell
        return False


def _is_frozen(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except PSUTIL_ERRORS:
        return False


_SIGNS: dict[str, Callable[[Beat], bool]] = {
    "raised an error": lambda beat: beat.state == RAISED,
    "was killed": lambda beat: beat.state == RUNNING and _is_gone(beat.pid),
    "is frozen": lambda beat: _is_frozen(beat.pid),
}
