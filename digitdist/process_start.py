"""What a command does before anything slow is imported: torch takes seconds, in which its launcher may end or ^C be pressed."""

from __future__ import annotations

import contextlib
import os
import signal
import sys

PARENT = os.getppid()  # what has started this process, which may have ended by the time that it is looked at


def is_command() -> bool:
    """Whether this process was started as ``python -m digitdist…``, while Python imports the package for it."""
    if sys.argv[:1] != ["-m"]:
        return False
    return sys.orig_argv[-len(sys.argv)].removeprefix("-m").split(".")[0] == "digitdist"


def prepare_process() -> None:
    """Has ^C end the process wherever it falls, until a training hears it; and keeps the numbers of closed standard streams.

    A `KeyboardInterrupt` would be lost in a library that catches everything while it is imported, and would not be raised at
    all while the main thread waits in C++. A file that gets a standard stream's number would get what libraries print there.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
