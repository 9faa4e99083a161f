"""What `torch.sim` is: the functions of a device, its one queue, and the notes of what has crossed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import digitdist

NAME = "sim"
PACKAGE, HERE = (str(Path(file).parent) for file in (digitdist.__file__, __file__))


class Transfers:
    """Notes each time that the host waits for the device, in the file of this rank."""

    step, due = 0, False  # the step being taken, and whether something is due in it
    file: Path | None = None

    @classmethod
    def note(cls, what: str) -> None:
        Stream.catch_up()
        if cls.file:
            with cls.file.open("a") as opened:
                opened.write(json.dumps({"step": cls.step, "due": cls.due, "what": what, "where": where()}) + "\n")


def where() -> str:
    """The innermost lines of digitdist that led here, else of anything else. The backward pass has a thread of its own."""
    frames, frame = [], sys._getframe()
    while frame:
        frames.append((frame.f_code.co_filename, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"))
        frame = frame.f_back
    others = [place for file, place in frames if not file.startswith(HERE)]
    ours = [place for file, place in frames if file.startswith(PACKAGE)]
    return " < ".join((ours or others)[:5]) or "backward pass"


class Stream:
    """The one queue of the device. Only copies to the host wait in it: all else has come when it is asked for."""

    waiting: ClassVar[list[tuple[Tensor, Tensor]]] = []  # host tensors, and the numbers that they get
    asked = 0  # how many copies have ever been asked for
    device_index = stream_id = 0

    def __init__(self, *_: Any, **__: Any):
        pass

    @classmethod
    def copy_later(cls, host: Tensor, numbers: Tensor) -> Tensor:
        host.fill_(float("nan") if host.is_floating_point() else -1)
        cls.waiting.append((host, numbers.clone()))
        cls.asked += 1
        return host

    @classmethod
    def catch_up(cls, until: int | None = None) -> None:
        """Has the first `until` copies come, all unless told."""
        left = 0 if until is None else max(0, cls.asked - until)
        while len(cls.waiting) > left:
            host, numbers = cls.waiting.pop(0)
            host.copy_(numbers)

    def synchronize(self) -> None:
        Transfers.note("synchronize")

    def query(self) -> bool:
        return not self.waiting

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def wait_event(self, event: Event) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


class Event:
    """A point in the queue. It has come after SIMULATED_LAG queries."""

    def __init__(self, *_: Any, **__: Any):
        self.position = self.queries_left = 0

    def record(self, stream: Stream | None = None) -> None:
        self.position, self.queries_left = Stream.asked, int(os.environ.get("SIMULATED_LAG", "0"))

    def query(self) -> bool:
        if self.queries_left:
            self.queries_left -= 1
            return False
        Stream.catch_up(self.position)
        return True

    def synchronize(self) -> None:
        Transfers.note("synchronize with an event")

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 0.0


class DeviceModule:
    """As `torch.cuda` and `torch.xpu` are. Each rank of a host has a device of its own, and calls it the first."""

    Stream, Event = Stream, Event
    seed: int | None = None  # of the device's generator

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def device(self, device: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get_device_name(self, device: Any = None) -> str:
        return "simulated device"

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def manual_seed(self, seed: int) -> None:
        DeviceModule.seed = seed

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None:
        Transfers.note("synchronize")

    def current_stream(self, device: Any = None) -> Stream:
        return Stream()

    default_stream = current_stream

    def stream(self, stream: Stream) -> Stream:
        return stream

    def max_memory_allocated(self, device: Any = None) -> int:
        """In bytes, of the process: the device's memory is the host's."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    memory_allocated = max_memory_reserved = memory_reserved = max_memory_allocated

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    empty_cache = reset_peak_memory_stats
