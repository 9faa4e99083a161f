"""The phases of a step, and the seconds that each takes."""

from __future__ import annotations

import time

PHASES = ("start", "data", "forward", "backward", "sync", "update", "log", "eval", "save", "end")
# What the seconds of a phase count as in the log; all others as "other".
LABELS = {"data": "data", "forward": "compute", "backward": "compute", "sync": "sync", "update": "optimizer"}
LABELS |= {"eval": "evaluation", "save": "checkpoint"}
TRAINING = ("data", "forward", "backward", "sync", "update")  # what counts as time of training


class PhaseTimer:
    """Adds up the seconds of each phase on this rank."""

    def __init__(self) -> None:
        self.phase = 0  # index into PHASES
        self.training_seconds = 0.0  # of the phases in TRAINING
        self._seconds = [0.0] * len(PHASES)
        self._since = self._lap_start = time.perf_counter()

    def begin(self, phase: str, since: float | None = None) -> None:
        """Ends the phase that is going on and begins another, now or at the `time.perf_counter()` of `since`."""
        self._add(max(since or time.perf_counter(), self._since))
        self.phase = PHASES.index(phase)

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap: ``total``, and by label (``data``, ``compute``, ``sync``, …, ``other``)."""
        self._add(time.perf_counter())
        times = dict.fromkeys(("total", *LABELS.values(), "other"), 0.0)
        for phase, seconds in zip(PHASES, self._seconds, strict=True):
            times[LABELS.get(phase, "other")] += seconds
        times["total"], self._lap_start = self._since - self._lap_start, self._since
        self._seconds = [0.0] * len(PHASES)
        return times

    def _add(self, now: float) -> None:
        seconds = now - self._since
        self._seconds[self.phase] += seconds
        if PHASES[self.phase] in TRAINING:
            self.training_seconds += seconds
        self._since = now
