"""Faults that tests ask for, built into the program so that they happen at an exact place."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

from digitdist.world import restart_count


@dataclass
class InjectedFault:
    """A fault at a rank, step and phase, when that phase of that step begins for the nth time.

    Read from DIGITDIST_FAULT, such as ``kill rank=1 step=30 phase=backward``; kinds: kill, raise, freeze, slow, full. After
    a launcher's restart it no longer happens, unless ``always=1``.
    """

    kind: str
    rank: int
    step: int
    phase: str
    nth: int = 1
    always: int = 0
    begun: int = 0

    @classmethod
    def from_environment(cls) -> InjectedFault | None:
        kind, *parts = os.environ.get("DIGITDIST_FAULT", "").split() or [""]
        values = dict(part.split("=") for part in parts)
        phase = values.pop("phase", "")
        fault = cls(kind=kind, phase=phase, **{name: int(value) for name, value in values.items()}) if kind else None
        return fault if fault and (fault.always or restart_count() == 0) else None

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
            case "slow":
                time.sleep(2.0)
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "raise":
                raise RuntimeError("a fault that a test has asked for")
