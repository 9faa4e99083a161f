"""Where each rank of a host is, in a file that its processes map into memory.

What is in the map outlives the process that wrote it, so the ranks that are left can name the one that ended a run.
"""

from __future__ import annotations

import mmap
import os
import platform
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from digitdist.distributed.fault_injection import InjectedFault
from digitdist.distributed.phases import PHASES, PhaseTimer
from digitdist.world import World

RECORD = struct.Struct("<6q")  # pid, host, step, phase, state, unused
RUNNING, RAISED, NOTICED = range(3)


@dataclass(frozen=True)
class Beat:
    """What is known of one rank: its process, its position, and whether it has raised an error or noticed another's end."""

    rank: int
    pid: int
    host: int
    step: int
    phase: str
    state: int

    @property
    def position(self) -> str:
        return f"step {self.step}, phase {self.phase}"


class Heartbeat:
    """Writes this rank's position into the file. Beginning a phase costs one write to memory and adds to `timer`."""

    def __init__(self, file: Path, world: World):
        size = world.size * RECORD.size
        with file.open("a+b") as opened:
            if os.fstat(opened.fileno()).st_size < size:
                opened.truncate(size)
            self._map = mmap.mmap(opened.fileno(), size)
        self.rank, self.host = world.rank, zlib.crc32(platform.node().encode())
        self.timer, self.step, self._state = PhaseTimer(), 0, RUNNING
        self._fault = InjectedFault.from_environment()
        self._write()

    def phase(self, name: str, since: float | None = None) -> None:
        """Begins a phase of `PHASES`, now or at the `time.perf_counter()` of `since`."""
        self.timer.begin(name, since)
        self._write()
        if self._fault:
            self._fault.at(self.rank, self.step, name)

    @property
    def position(self) -> str:
        return f"step {self.step}, phase {PHASES[self.timer.phase]}"

    def mark(self, state: int) -> None:
        """Records that this rank has RAISED an error of its own, or NOTICED that another one is gone."""
        self._state = state
        self._write()

    def beats(self) -> list[Beat]:
        """The ranks of this host."""
        return [beat for beat in read_beats(self._map) if beat.host == self.host]

    def _write(self) -> None:
        offset = self.rank * RECORD.size
        RECORD.pack_into(self._map, offset, os.getpid(), self.host, self.step, self.timer.phase, self._state, 0)


def read_beats(content: bytes | mmap.mmap) -> list[Beat]:
    """The ranks that have written into a heartbeat file, in their order."""
    return [
        Beat(rank, pid, host, step, PHASES[phase], state)
        for rank, (pid, host, step, phase, state, _) in enumerate(RECORD.iter_unpack(content))
        if pid
    ]
