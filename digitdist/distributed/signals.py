"""Requests to stop: signals, and a file in the run's folder."""

from __future__ import annotations

import _thread
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from digitdist.distributed.launcher import launcher_has_ended
from digitdist.distributed.process import end_process
from digitdist.world import is_main, print_main, under_torchelastic

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
LOOK_EVERY_S = 0.5
SAME_INTERRUPT_S = 0.5  # a launcher passes a terminal's ^C on to processes that have had it from the terminal already
INTERRUPT_S = 1.0  # in which the main thread takes a second ^C, unless it waits in C++


class StopRequest:
    """Each of `SIGNALS` as a flag that the trainer reads; a second SIGINT raises `KeyboardInterrupt`.

    A thread hears them, since Python runs no signal handler while the main thread waits in C++, as for a GPU; it ends the
    process itself where that wait outlasts a second SIGINT. `report` prints a line on the main rank; any thread may call it.
    """

    def __init__(self) -> None:
        self.requested = False
        self.report: Callable[[str], None] = print_main
        self._interrupted = False  # whether the main thread is to raise `KeyboardInterrupt`
        self._is_main = is_main()
        self._looked_s = 0.0
        self._writer: socket.socket | None = None

    def listen(self) -> None:
        """Begins to hear signals, in a process's main thread; a training in another thread has the file alone."""
        if threading.current_thread() is not threading.main_thread():
            return
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which is what nohup does
                signal.signal(number, self._handle)
        threading.Thread(target=self._hear, args=[reader], name="signals", daemon=True).start()

    def close(self) -> None:
        """Ends the thread: signals are no longer heard."""
        if self._writer is not None:
            signal.set_wakeup_fd(-1)
            self._writer.close()
            self._writer = None

    def is_requested(self, stop_file: Path) -> bool:
        """True once this process has had a signal, or the main rank has seen `stop_file`, for which it looks twice a second."""
        now = time.monotonic()
        if not self.requested and self._is_main and now - self._looked_s > LOOK_EVERY_S:
            self._looked_s = now
            self.requested = stop_file.exists()
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, late where that waits in C++."""
        self.requested = True
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt

    def _hear(self, reader: socket.socket) -> None:
        """The thread: reads the numbers of signals, a byte each, as they arrive."""
        first, first_s, ended = 0, 0.0, False
        while received := reader.recv(1):
            number, now = received[0], time.monotonic()
            if number in SIGNALS and not first:
                self.requested, first, first_s = True, number, now
                again = "; ^C again ends the run at once" if number == signal.SIGINT else ""
                self.report(f"{signal.Signals(number).name}: asked to stop after this step{again}")
            elif not ended and ((number == signal.SIGINT and now - first_s > SAME_INTERRUPT_S) or _is_end_of_torchrun(first)):
                ended = True
                self._interrupt()
        reader.close()

    def _interrupt(self) -> None:
        self._interrupted = True
        _thread.interrupt_main()
        time.sleep(INTERRUPT_S)
        if self._interrupted:
            end_process(128 + signal.SIGINT)


def _is_end_of_torchrun(first: int) -> bool:
    """Whether torchrun has ended after a first ^C, which it passes on: after a second one, which it does not."""
    return first == signal.SIGINT and under_torchelastic() and launcher_has_ended()
