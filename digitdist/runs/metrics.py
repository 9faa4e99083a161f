"""``metrics.jsonl``: one JSON line an event, the true record of a run; each line is flushed before anything else is done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from digitdist.errors import in_one_line
from digitdist.files import atomic_write, parse_json, read_plain

METRICS = "metrics.jsonl"
LARGEST = 4 << 30  # bytes that are read
TAIL = 1 << 16  # bytes, more than a line has


class MetricsLog:
    """Appends events to ``metrics.jsonl`` in `folder`.

    What a full disk does not take waits for the next event; `report` gets a line about it at first, and one when it is over.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]):
        self._file = (folder / METRICS).open("ab", buffering=0)
        self._pending, self._waits_for = b"", ""  # what is not written yet, and why
        self._report = report

    def append(self, event: Mapping[str, Any]) -> None:
        self._pending += json.dumps(event).encode() + b"\n"
        self._write()

    def flush(self) -> None:
        """Has all lines on the disk.

        Raises:
            OSError: the disk does not take them.
        """
        self._write()
        if self._pending:
            raise OSError(f"the lines of {METRICS} before it cannot be written ({self._waits_for})")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self._write()
            self._file.close()

    def _write(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
        except OSError as error:
            if not self._waits_for:
                self._report(f"{METRICS} cannot be written now ({error.strerror}); its lines wait in memory")
            self._waits_for = str(error.strerror)
        else:
            if self._waits_for:
                self._report(f"{METRICS} is written again; no line is lost")
            self._waits_for = ""


def read_metrics(folder: Path, report: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """The events of a run, in order, but not a last line that was cut short. `report` gets a line where more is left out."""
    file = folder / METRICS
    try:
        return read_json_lines(file, _is_event, report)
    except OSError as error:
        report(f"{file} is damaged and left out ({in_one_line(error.strerror)})")
        return []


def last_event(folder: Path) -> dict[str, Any] | None:
    """The last whole event of a run, for which little is read; None where there is none."""
    try:
        with (folder / METRICS).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read(TAIL).split(b"\n")[:-1]
    except OSError:
        return None
    return next((value for line in reversed(lines) if (value := _object(line)) is not None and _is_event(value)), None)


def read_json_lines(
    file: Path, is_whole: Callable[[dict[str, Any]], bool], report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The objects with a step, one a line of `file`, that are whole: none without a file, nor a last line that was cut short.
    `report` gets a line where more is left out.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        lines = read_plain(file, LARGEST).split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = [value for line in lines if (value := _object(line)) is not None and is_whole(value)]
    if len(found) < len(lines):
        report(f"{file}: {len(lines) - len(found)} damaged lines are left out")
    return found


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line.strip(b"\0"))  # with which a crash of the host may fill up a file
    except ValueError:
        return None
    return value if isinstance(value, dict) and type(value.get("step")) is int else None


def _is_event(value: dict[str, Any]) -> bool:
    """Whether it has an epoch, and numbers alone."""
    return "epoch" in value and all(type(number) in (int, float) for number in value.values())


def truncate_metrics(folder: Path, last_step: int, report: Callable[[str], None]) -> None:
    """Removes the events after `last_step`, which the resumed run repeats, and what is damaged, of which `report` gets a line.

    Raises:
        OSError: the disk is full, or writing fails.
    """
    kept = [event for event in read_metrics(folder, report) if event["step"] <= last_step]
    atomic_write(folder / METRICS, b"".join(json.dumps(event).encode() + b"\n" for event in kept))
