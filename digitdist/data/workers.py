"""Worker processes of a `DataLoader`."""

from __future__ import annotations

import signal


def ignore_stop_requests(worker: int) -> None:
    """Has a new worker process leave requests to stop to the process that it reads for, and end with that."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
