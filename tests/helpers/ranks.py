"""Worlds whose ranks are forks of one process that has imported torch, which takes seconds of each that torchrun starts.

    python -m helpers.ranks PLACE SIZES MODULE [ARGS...]

does what ``python -m MODULE ARGS...`` does on every rank of a world of each size, such as ``1,2,3``, one world after another;
what the ranks of a world print goes into ``PLACE/SIZE.out`` and ``PLACE/SIZE.err``. It ends with the exit code of the first
rank that fails, once it has ended the others. For workers of tests: what a launcher does is tested with a launcher.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

import accelerate  # noqa: F401
import omegaconf  # noqa: F401
import PIL.Image  # noqa: F401
import pytest  # noqa: F401
import torch  # noqa: F401


def become_rank(rank: int, size: int, port: int, streams: Path, command: list[str]) -> None:
    """Does not return."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{streams}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        world = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
        sys.argv = command
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_world(size: int, streams: Path, command: list[str]) -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids = set[int]()
    for rank in range(size):
        pid = os.fork()
        if not pid:
            become_rank(rank, size, port, streams, command)
        pids.add(pid)
    failed = 0
    while pids:
        pid, status = os.wait()
        pids.discard(pid)
        if (code := os.waitstatus_to_exitcode(status)) and not failed:
            failed = code
            for other in pids:
                os.kill(other, signal.SIGKILL)
    return failed


def main() -> None:
    place, sizes, *command = sys.argv[1:]
    sys.path[0] = os.getcwd()
    for size in map(int, sizes.split(",")):
        if code := run_world(size, Path(place) / str(size), command):
            sys.exit(code)


if __name__ == "__main__":
    main()
