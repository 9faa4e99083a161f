"""What is printed is expendable: a closed pipe, a full disk or a terminal that has gone must not cost a result."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO, cast

from digitdist.errors import in_one_line


class ExpendableStream:
    """A text stream like `stream`, whose writes never fail; the first that does is reported to `other`, if that takes it.

    What cannot be written then is left out. A later write may succeed again, as on a disk that was full.
    """

    def __init__(self, stream: TextIO, name: str, other: TextIO | None):
        self._stream, self._name, self._other = stream, name, other
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self._report(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        if self._failed:
            return
        self._failed = True
        if self._other is not None:
            reason = getattr(error, "strerror", None) or in_one_line(error)
            print(f"{self._name} takes no more ({reason}); the command goes on without it", file=self._other, flush=True)


def make_expendable(*names: str) -> None:
    """Makes ``stdout`` or ``stderr`` of `sys`, or both, an `ExpendableStream`; one that is closed goes nowhere."""
    for name in names:
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115, it is kept as long as the process lives
        if not isinstance(stream, ExpendableStream):
            other = getattr(sys, "stderr" if name == "stdout" else "stdout")
            reports_to = None if name == "stderr" else ExpendableStream(other, "stderr", None) if other else None
            setattr(sys, name, cast(TextIO, ExpendableStream(stream, name, cast("TextIO | None", reports_to))))


def take_all_characters() -> None:
    """Has the standard streams write what their encoding lacks as escapes, as on a terminal that takes ASCII alone."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a notebook's streams have none, and take everything
        if reconfigure:
            reconfigure(errors="backslashreplace")
