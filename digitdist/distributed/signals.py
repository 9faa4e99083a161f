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

from digitdist.distributed.process import end_process, is_command
from digitdist.world import is_main, print_main, under_torchelastic

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
LOOK_EVERY_S = 0.5
SAME_INTERRUPT_S = 0.5  # a launcher passes a terminal's ^C on to processes that have had it from the terminal already
SAVING_S = 2.5  # in which a run that was stopped by one ^C may end by itself
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
            elif ended:
                continue
            elif _is_torchruns_second(first, number) or (number == signal.SIGINT and now - first_s > SAME_INTERRUPT_S):
                ended = True
                self._interrupt()
            elif number == signal.SIGINT and not under_torchelastic():  # one ^C twice, or two at once
                ended = True
                threading.Thread(target=self._interrupt, args=[SAVING_S], daemon=True).start()
        reader.close()

    def _interrupt(self, after_s: float = 0.0) -> None:
        time.sleep(after_s)
        if self._writer is None:
            return  # the training has ended, and its process goes on
        self._interrupted = True
        _thread.interrupt_main()
        time.sleep(INTERRUPT_S)
        if not self._interrupted:
            if not is_command():
                return
            time.sleep(SAVING_S)  # in which it ends, unless a library has swallowed the `KeyboardInterrupt`
        end_process(128 + signal.SIGINT)


def _is_torchruns_second(first: int, number: int) -> bool:
    """Whether this is a second ^C to torchrun, which passes the first one on, and on the second sends SIGTERM, or ends."""
    return first == signal.SIGINT and number == signal.SIGTERM and under_torchelastic()
