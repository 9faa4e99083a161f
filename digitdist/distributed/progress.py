"""How far a device has come: its host runs ahead of it, by many steps where nothing is due."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

MARKED = ("backward", "data")  # phases of a host; when a device gets there, it has finished a forward pass, or a step


class DeviceProgress:
    """The last position that a device has reached, of those marked in its queue.

    The thread that gives the device work marks; another one looks, since the first may be waiting.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reached = (0, 0)
        self._module: Any = torch.get_device_module(device)
        self._pending: deque[tuple[tuple[int, int], Any]] = deque()
        self._unused: list[Any] = []

    def mark(self, position: tuple[int, int]) -> None:
        """Puts an event into the device's queue, for 3 µs."""
        event = self._unused.pop() if self._unused else self._module.Event()
        event.record()
        self._pending.append((position, event))

    def look(self) -> tuple[int, int]:
        """The last position reached. Waits for nothing."""
        while self._pending and self._pending[0][1].query():
            self.reached, event = self._pending.popleft()
            self._unused.append(event)
        return self.reached
