"""How a command begins and ends as a process: its launcher, its exit code, its last words."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from digitdist.distributed.launcher import end_restarting_launcher, follow_launcher, launcher_has_ended
from digitdist.distributed.output import ExpendableStream, make_expendable, take_all_characters
from digitdist.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER_ERROR, Fault, NotJoined, PeerFailed, Stopped, UserError
from digitdist.world import is_main, print_main, under_torchelastic

REPORT_GRACE_S = 30.0  # in which another rank of this host may report an error, and the launcher end this one

_is_command = _had_process_group = False


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command and ends the process with the exit code of its outcome.

    A closed pipe ends it with 0, unless `main` has made the output expendable: then printing is its only product.
    """
    global _is_command
    _is_command = True
    take_all_characters()
    make_expendable("stderr")
    follow_launcher()
    code = 0
    try:
        main()
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        _report_once_a_host(f"error: {error}")
        if not isinstance(error, NotJoined):
            end_restarting_launcher()
        code = EXIT_USER_ERROR
    except Stopped as stop:
        print_main(str(stop))
        if stop.final:
            end_restarting_launcher()
        code = EXIT_STOPPED
    except PeerFailed:
        code = EXIT_FAULT
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # whoever reads our output has seen enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        code = EXIT_FAULT
        if _is_output_lost(error):
            print("error: no space is left for what is printed; make room, or print it elsewhere", file=sys.stderr)
            code = EXIT_USER_ERROR
        elif not isinstance(error, Fault) or is_main() or not _await_report():
            traceback.print_exc()
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends this process as any Python program ends; at once, if it has ever had a process group.

    No exit handler may then wait for a rank that is gone, and a gloo thread that frees its last tensor while Python shuts
    down would abort the process.
    """
    _flush()
    if _had_process_group:
        _remove_temporary_folders()
        os._exit(code)
    sys.exit(code)


def is_command() -> bool:
    """Whether this process is one of the commands, and ends with it."""
    return _is_command


def end_process(code: int) -> None:
    """Ends this process from any thread, whatever its main thread waits for; not a program, such as a notebook, that trains on
    one process and may have other things to do."""
    if _is_command or _had_process_group:
        _flush()
        os._exit(code)


def _is_output_lost(error: Exception) -> bool:
    """Whether the output, a command's only product, goes to a full disk."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
    return full and not isinstance(sys.stdout, ExpendableStream)


def _flush() -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one that was closed at the start is None
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()


def _remove_temporary_folders() -> None:
    """Removes the folders that Python would remove at its end, such as four of wandb's."""
    for found in gc.get_objects():
        if type(found) is tempfile.TemporaryDirectory and getattr(found, "_delete", True):
            with contextlib.suppress(OSError):
                found.cleanup()


def note_process_group() -> None:
    """Tells `leave` that this process has had a process group, even if that is destroyed by then."""
    global _had_process_group
    _had_process_group = True


def _report_once_a_host(text: str) -> None:
    """Prints an error on local rank 0; on torchrun's others if that has not reported it in a while."""
    others = under_torchelastic() and os.environ.get("LOCAL_RANK", "0") != "0"
    if not others or not _await_report():
        print(text, file=sys.stderr, flush=True)


def _await_report() -> bool:
    """Waits for the rank that is to report what has happened to all; returns whether it reports.

    A launcher ends all ranks as soon as that one has ended; where the launcher has ended, that rank reports all the same.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    deadline = time.monotonic() + REPORT_GRACE_S
    while time.monotonic() < deadline:
        if launcher_has_ended():
            return True
        time.sleep(0.2)
    return False
