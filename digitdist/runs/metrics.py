"""``metrics.jsonl``: one JSON line an event, the true record of a run; each line is flushed before anything else is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from digitdist.checkpoint import atomic_write

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends events to ``metrics.jsonl`` in `folder`. What a full disk does not take waits for the next event."""

    def __init__(self, folder: Path, report: Callable[[str], None]):
        self._file = (folder / METRICS).open("ab", buffering=0)
        self._pending = b""
        self._report = report

    def append(self, event: Mapping[str, Any]) -> None:
        self._pending += json.dumps(event).encode() + b"\n"
        self._write()

    def close(self) -> None:
        if not self._file.closed:
            self._write()
            self._file.close()

    def _write(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            self._report(f"{METRICS} cannot be written now ({error.strerror}); its lines wait in memory")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, in order, without a last line that a crash cut short."""
    try:
        lines = (folder / METRICS).read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def truncate_metrics(folder: Path, last_step: int) -> None:
    """Removes the events after `last_step`, which the resumed run repeats, and a line that a crash cut short."""
    kept = [event for event in read_metrics(folder) if event["step"] <= last_step]
    atomic_write(folder / METRICS, b"".join(json.dumps(event).encode() + b"\n" for event in kept))
