"""Requests to stop: signals, and a file in the run's folder."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType

from digitdist.world import is_main

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
LOOK_EVERY_S = 0.5
SAME_INTERRUPT_S = 0.5  # a launcher passes a terminal's ^C on to processes that have had it from the terminal already


class StopRequest:
    """SIGTERM, SIGINT and SIGUSR1 as a flag that the trainer reads; a second SIGINT raises `KeyboardInterrupt`.

    Only the main thread of a process may handle signals; a training in another one has the file alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_main = is_main()
        self._first_s = self._looked_s = 0.0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def is_requested(self, stop_file: Path) -> bool:
        """True once this process has had a signal, or the main rank has seen `stop_file`, for which it looks twice a second."""
        now = time.monotonic()
        if not self.requested and self._is_main and now - self._looked_s > LOOK_EVERY_S:
            self._looked_s = now
            self.requested = stop_file.exists()
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested and time.monotonic() - self._first_s > SAME_INTERRUPT_S:
            raise KeyboardInterrupt
        if not self.requested:
            self.requested, self._first_s = True, time.monotonic()
