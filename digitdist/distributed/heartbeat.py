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

import torch

from digitdist.distributed.fault_injection import InjectedFault
from digitdist.distributed.phases import PHASES, PhaseTimer
from digitdist.distributed.progress import MARKED, DeviceProgress
from digitdist.world import World

RECORD = struct.Struct("<5q2i")  # pid, host, step, phase, state; the place that the device has reached
REACHED = struct.Struct("<2i")  # the last two
RUNNING, RAISED, NOTICED, LEFT = range(4)  # it runs; has raised an error; has noticed another's end; has left with all others


@dataclass(frozen=True)
class Beat:
    """What is known of one rank: its process, the position of its host, its state, and the position of its device."""

    rank: int
    pid: int
    host: int
    step: int
    phase: str
    state: int
    reached: tuple[int, int]  # the place that its device has reached; that of its host on a CPU

    @property
    def position(self) -> str:
        return f"step {self.step}, phase {self.phase}"

    @property
    def place(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """How far it has come: its device, then its host."""
        return self.reached, place(self.step, self.phase)


def place(step: int, phase: str) -> tuple[int, int]:
    """A position in training that can be compared: data are read for the step that follows."""
    return step + (phase == "data"), PHASES.index(phase)


class Heartbeat:
    """Writes this rank's position into the file. Beginning a phase costs one write to memory and adds to `timer`."""

    def __init__(self, file: Path, world: World, device: torch.device | None = None):
        size = heartbeat_size(world)
        with file.open("a+b") as opened:
            missing = size - os.fstat(opened.fileno()).st_size
            if missing > 0:
                opened.write(bytes(missing))  # a hole would cost the process its life where the disk is full when it is filled
                opened.flush()
            self._map = mmap.mmap(opened.fileno(), size)
        self.world_size = world.size
        self.turns = 0  # how often this rank's main thread has been round in a wait that may be long
        self.rank, self.host = world.rank, zlib.crc32(platform.node().encode())
        self.timer, self.step, self._state = PhaseTimer(), 0, RUNNING
        runs_ahead = device is not None and device.type != "cpu" and world.size > 1
        self.progress = DeviceProgress(device) if device and runs_ahead else None
        self._faults = InjectedFault.all_from_environment()
        self._write()

    def phase(self, name: str, since: float | None = None) -> None:
        """Begins a phase of `PHASES`, now or at the `time.perf_counter()` of `since`."""
        self.timer.begin(name, since)
        if self.progress and name in MARKED:
            self.progress.mark(place(self.step, name))
        self._write()
        for fault in self._faults:
            fault.at(self.rank, self.step, name)

    @property
    def position(self) -> str:
        return f"step {self.step}, phase {PHASES[self.timer.phase]}"

    @property
    def is_over(self) -> bool:
        """Whether this rank needs the others no more."""
        return PHASES[self.timer.phase] == "end"

    def mark(self, state: int) -> None:
        """Records what has become of this rank."""
        self._state = state
        self._write()

    def beats(self) -> list[Beat]:
        """The ranks of this host."""
        return [beat for beat in read_beats(self._map) if beat.host == self.host]

    def others(self) -> list[Beat]:
        """The ranks of this host but for this one."""
        return [beat for beat in self.beats() if beat.rank != self.rank]

    def write_reached(self) -> None:
        """Writes what this rank's device has reached; another thread than that of `phase` may call it."""
        if self.progress:
            REACHED.pack_into(self._map, (self.rank + 1) * RECORD.size - REACHED.size, *self.progress.look())

    def _write(self) -> None:
        reached = self.progress.reached if self.progress else place(self.step, PHASES[self.timer.phase])
        values = os.getpid(), self.host, self.step, self.timer.phase, self._state, *reached
        RECORD.pack_into(self._map, self.rank * RECORD.size, *values)


def heartbeat_size(world: World) -> int:
    """The bytes of the file in which all ranks of `world` write."""
    return world.size * RECORD.size


def read_beats(content: bytes | mmap.mmap) -> list[Beat]:
    """The ranks that have written into a heartbeat file, in their order; what is cut short or damaged is left out."""
    whole = content[: len(content) // RECORD.size * RECORD.size]
    return [
        Beat(rank, pid, host, step, PHASES[phase], state, (reached_step, reached_phase))
        for rank, (pid, host, step, phase, state, reached_step, reached_phase) in enumerate(RECORD.iter_unpack(whole))
        if pid > 0 and phase in range(len(PHASES))
    ]
