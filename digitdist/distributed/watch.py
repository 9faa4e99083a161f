"""Ends a rank whose main thread cannot notice that another one is gone, since it waits for a device.

gloo raises in the main thread when a collective fails. NCCL does not: the main thread waits in C++, and NCCL's own watchdog
ends the process a minute late, without a name.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

import torch

from digitdist.distributed.failures import FailedRank, find_failed_rank, has_failed
from digitdist.distributed.heartbeat import NOTICED, Heartbeat
from digitdist.distributed.process import end_process
from digitdist.errors import EXIT_FAULT

LOOK_EVERY_S = 0.25
MAIN_FIRST_S = 1.5  # in which the main thread may notice by itself


class PeerWatch:
    """A thread that looks at the ranks of this host and at this rank's main thread.

    Where another rank has failed, or the main thread has stood at one instruction for `timeout_s`, and does not act by itself,
    the thread calls `report` and ends the process. A time in which the whole process was suspended does not count.
    """

    def __init__(self, heartbeat: Heartbeat, timeout_s: float, report: Callable[[FailedRank], None]):
        self.heartbeat, self.timeout_s, self.report = heartbeat, timeout_s, report
        self._main = threading.get_ident()
        self._position: tuple[object, ...] = ()
        self._waiting_s = self._failed_s = 0.0  # how long the main thread has not moved; since a peer was seen to have failed
        self._acting = threading.Lock()

    def start(self) -> None:
        """Begins to watch, where there are other ranks."""
        if self.heartbeat.world_size > 1:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def take_over(self, state: int) -> None:
        """Called by the main thread before it acts by itself: this watch then does nothing any more. Records what has become of
        this rank."""
        if not self._acting.acquire(blocking=False):
            time.sleep(self.timeout_s)  # the watch ends the process at this moment
        self.heartbeat.mark(state)

    def _watch(self) -> None:
        if self.heartbeat.progress:  # or this thread's look would begin a context on the first GPU
            torch.accelerator.set_device_index(self.heartbeat.progress.device)
        looked = time.monotonic()
        while not self._acting.locked() and not self.heartbeat.is_over:
            time.sleep(LOOK_EVERY_S)
            looked, before = time.monotonic(), looked
            if self._must_act(min(looked - before, 2 * LOOK_EVERY_S)) and self._acting.acquire(blocking=False):
                self.heartbeat.mark(NOTICED)
                self.report(find_failed_rank(self.heartbeat))
                end_process(EXIT_FAULT)

    def _must_act(self, seconds: float) -> bool:
        """Looks once, `seconds` after the time before."""
        self.heartbeat.write_reached()
        frame = sys._current_frames().get(self._main)
        position = (self.heartbeat.position, self.heartbeat.turns, id(frame), frame and frame.f_lasti)
        self._waiting_s = self._waiting_s + seconds if position == self._position else 0.0
        self._position = position
        self._failed_s = self._failed_s + seconds if any(map(has_failed, self.heartbeat.others())) else 0.0
        return self._failed_s > MAIN_FIRST_S or self._waiting_s > self.timeout_s + MAIN_FIRST_S
