"""What ends a command early, and the exit code of each: a user's mistake, a fault, a request to stop."""

from __future__ import annotations

EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


class UserError(Exception):
    """One or more mistakes of the user: each says what is wrong, its value, what is allowed and what to do. Exit code 2."""

    def __init__(self, *mistakes: str):
        super().__init__(*mistakes)
        self.mistakes = mistakes

    def __str__(self) -> str:
        return "\n       ".join(self.mistakes)  # aligned under the first one, which follows "error: "


class NotJoined(UserError):
    """The ranks have not come together. A launcher that may start the workers again is left to do so."""


class Fault(Exception):
    """A fault that every rank has seen at the same place. The main rank prints its traceback. Exit code 1."""


class PeerFailed(Exception):
    """Another rank has ended the run, and one rank of this host has reported it. Exit code 1, without a traceback."""


class RunsFailed(PeerFailed):
    """Runs that this command has started have failed, which it has reported. Exit code 1, without a traceback."""


class Stopped(Exception):
    """The run was asked to stop and has been saved; the same command resumes it. Exit code 75.

    `final`: also a launcher that would start its workers again is to end.
    """

    def __init__(self, message: str, final: bool = False):
        super().__init__(message)
        self.final = final


def in_one_line(error: object) -> str:
    """The text of `error` without line breaks, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
