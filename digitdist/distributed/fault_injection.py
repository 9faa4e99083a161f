"""Faults that tests ask for, built into the program so that they happen at an exact place."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from dataclasses import dataclass

from digitdist.world import restart_count


@dataclass
class InjectedFault:
    """A fault at a rank, step and phase, when that phase of that step begins for the nth time.

    Read from DIGITDIST_FAULT, such as ``kill rank=1 step=30 phase=backward``, several separated by ``;``. Kinds: kill, raise,
    freeze, slow, full, and block, where the main thread waits in C++ for ever, as for a GPU that does not answer. After a
    launcher's restart they no longer happen, unless ``always=1``.
    """

    kind: str
    rank: int
    step: int
    phase: str
    nth: int = 1
    always: int = 0
    begun: int = 0

    @classmethod
    def all_from_environment(cls) -> list[InjectedFault]:
        faults = [cls._parse(text) for text in os.environ.get("DIGITDIST_FAULT", "").split(";") if text.strip()]
        return [fault for fault in faults if fault.always or restart_count() == 0]

    @classmethod
    def _parse(cls, text: str) -> InjectedFault:
        kind, *parts = text.split()
        values = dict(part.split("=") for part in parts)
        phase = values.pop("phase")
        return cls(kind=kind, phase=phase, **{name: int(value) for name, value in values.items()})

    def at(self, rank: int, step: int, phase: str) -> None:
        """Makes the fault happen if this is its place."""
        if (self.rank, self.step, self.phase) == (rank, step, phase):
            self.begun += 1
            if self.begun == self.nth:
                self._happen()

    def _happen(self) -> None:
        match self.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "block":
                libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # zeros: one that nobody holds
                for _ in range(2):
                    libc.pthread_mutex_lock(mutex)
            case "slow":
                time.sleep(2.0)
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "raise":
                raise RuntimeError("a fault that a test has asked for")
